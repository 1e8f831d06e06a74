"""Adapters to JAX's frameworks and to serialisation.

arrays              trees of `flax.nnx` variables as trees of arrays
axes/               matrix axes of parameters, as modules declare them
export              registration of states with `jax.export`
flax_serialization  registration of quantised arrays with `flax.serialization`
"""

from nanochat_jax.interop.arrays import as_arrays as as_arrays, for_nnx as for_nnx
from nanochat_jax.interop.axes import in_tree as in_tree, matrix_axes as matrix_axes
from nanochat_jax.interop.export import register_for_export as register_for_export
from nanochat_jax.interop.flax_serialization import (
    register_for_flax as register_for_flax,
)
