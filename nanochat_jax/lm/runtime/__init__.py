"""TODO."""

from nanochat_jax.lm.runtime import (
    atomic_files as atomic_files,
    device as device,
    installation as installation,
    machine as machine,
    processes as processes,
    utilization as utilization,
)
from nanochat_jax.lm.runtime.agreement import stopping as stopping
from nanochat_jax.lm.runtime.atomic_files import replacing as replacing
from nanochat_jax.lm.runtime.utilization import memory_in_use as memory_in_use
