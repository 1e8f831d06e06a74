"""What the modules of JAX's frameworks say of their parameters."""

from nanochat_jax.interop.arrays import as_arrays as as_arrays, for_nnx as for_nnx
from nanochat_jax.interop.axes import in_tree as in_tree, matrix_axes as matrix_axes
from nanochat_jax.interop.export import register_for_export as register_for_export
