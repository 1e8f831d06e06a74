"""TODO."""

from nanochat_jax.transforms.galore import projection as projection
from nanochat_jax.transforms.galore.accumulation import (
    project_gradients as project_gradients,
)
from nanochat_jax.transforms.galore.adaptive import (
    Adaptive as Adaptive,
    AdaptiveState as AdaptiveState,
)
from nanochat_jax.transforms.galore.projection import (
    Rank as Rank,
    check_rank as check_rank,
)
from nanochat_jax.transforms.galore.transform import (
    GaloreState as GaloreState,
    galore as galore,
)
