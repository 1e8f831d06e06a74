"""The process and its machine: everything around training that knows no model.

atomic_files  files and folders that a crash leaves old or new, never half written
installation  faults of an installation of JAX, each with its remedy
machine       the choice of the device, hardware and versions in words
processes     several processes of one run: how they start, meet and end
stop          an orderly stop on a signal, of all processes after the same step
utilization   memory in use, bytes of arrays, model FLOPs utilisation
watchdog      the name of a process that keeps the others waiting
"""

from nanochat_jax.lm.runtime import (
    atomic_files as atomic_files,
    installation as installation,
    machine as machine,
    processes as processes,
    utilization as utilization,
)
from nanochat_jax.lm.runtime.atomic_files import (
    making_folder as making_folder,
    new_folder as new_folder,
    replacing as replacing,
    require_writable as require_writable,
    why_not_new as why_not_new,
    write_text as write_text,
)
from nanochat_jax.lm.runtime.stop import stopping as stopping
from nanochat_jax.lm.runtime.utilization import (
    memory_in_use as memory_in_use,
    tree_bytes as tree_bytes,
)
