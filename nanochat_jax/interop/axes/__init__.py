"""TODO."""

from nanochat_jax.interop.axes.modules import (
    in_tree as in_tree,
    matrix_axes as matrix_axes,
)
