"""TODO."""

from nanochat_jax.transforms.scheduling.groups import (
    group_by_shape as group_by_shape,
    group_bytes as group_bytes,
    piece_bytes as piece_bytes,
)
from nanochat_jax.transforms.scheduling.rows import by_rows as by_rows
from nanochat_jax.transforms.scheduling.sequence import sequence as sequence
