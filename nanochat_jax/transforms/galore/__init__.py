"""GaLore: transforms in a low-rank space of the gradient.

transform     `galore`
basis         rules for when and how a basis is computed
refresh       change of basis, and what it does to first moments
projection    products with a basis; which leaves are projected
complement    the part of a gradient outside the basis
"""

from nanochat_jax.transforms.galore import projection as projection
from nanochat_jax.transforms.galore.basis import (
    Basis as Basis,
    RandomizedSVD as RandomizedSVD,
)
from nanochat_jax.transforms.galore.projection import (
    Rank as Rank,
    check_rank as check_rank,
    saves_bytes as saves_bytes,
)
from nanochat_jax.transforms.galore.transform import (
    GaloreState as GaloreState,
    galore as galore,
)
