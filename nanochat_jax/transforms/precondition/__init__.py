"""Preconditioning: updates scaled in the eigenbases of their gradients.

transform   `precondition`
power_step  `PowerStep`, the rule for when and how bases are computed
refresh     averages of `GGᵀ` taken in, bases renewed, moments put in their order
rotated     division by mean squares in the coordinates of the bases
"""

from nanochat_jax.transforms.precondition.power_step import PowerStep as PowerStep
from nanochat_jax.transforms.precondition.transform import (
    PreconditionState as PreconditionState,
    precondition as precondition,
)
