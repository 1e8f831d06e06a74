"""TODO."""

from nanochat_jax.transforms.sharding import (
    placement as placement,
    specs as specs,
    whole_matrices as whole_matrices,
)
from nanochat_jax.transforms.sharding.bits import (
    from_bits as from_bits,
    to_bits as to_bits,
)
from nanochat_jax.transforms.sharding.varying import (
    vary_over as vary_over,
    varying_axes as varying_axes,
)
