"""The order of work on leaves, which bounds temporaries.

sequence  groups of leaves, one after another
groups    which leaves are worked on together
parts     updates and state of some leaves alone
alike     leaves that have one program
turns     a loop over arrays of one shape, which are written over
rows      a few rows of a large array at a time
barrier   work that waits for other work
"""

from nanochat_jax.transforms.scheduling.barrier import (
    after as after,
    run_after as run_after,
)
from nanochat_jax.transforms.scheduling.groups import (
    group_by_shape as group_by_shape,
    group_bytes as group_bytes,
    piece_bytes as piece_bytes,
)
from nanochat_jax.transforms.scheduling.parts import Parts as Parts
from nanochat_jax.transforms.scheduling.rows import (
    by_rows as by_rows,
    in_pieces as in_pieces,
    rows_at_a_time as rows_at_a_time,
)
from nanochat_jax.transforms.scheduling.sequence import sequence as sequence
