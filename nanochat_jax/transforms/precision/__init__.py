"""Types of numbers: float32 inside, weights in bfloat16 without losing small updates.

wide           short floats widened at the start, results cast once at the end
round_updates  updates that land on bfloat16 weights by stochastic rounding
split_master   further bits of bfloat16 weights, as state
whole_weights  float32 weights from bfloat16 weights with their low bits, and back
pairs          a float32 number as bfloat16 and low bits
short_leaves   which parameters these links take, and which they refuse
"""

from nanochat_jax.transforms.precision.round_updates import (
    RoundUpdatesState as RoundUpdatesState,
    round_updates as round_updates,
)
from nanochat_jax.transforms.precision.split_master import (
    SplitMasterState as SplitMasterState,
    split_master as split_master,
)
from nanochat_jax.transforms.precision.whole_weights import (
    master_weights as master_weights,
    split_weights as split_weights,
)
from nanochat_jax.transforms.precision.wide import (
    cast_like as cast_like,
    in_float32 as in_float32,
    inexact as inexact,
    widened as widened,
)
