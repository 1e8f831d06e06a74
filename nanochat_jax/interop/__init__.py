"""What the modules of JAX's frameworks say of their parameters."""

from nanochat_jax.interop.modules import (
    in_tree as in_tree,
    matrix_axes as matrix_axes,
)
