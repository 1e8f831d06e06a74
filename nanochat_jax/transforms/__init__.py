"""Gradient transformations, and the one law by which they compose.

In `optax.chain` every stage is initialised with the full-size parameters and stages
share no state. Therefore:

  * what keeps the shape of updates and the storage of state is a *link* of a chain:
    `momentum`, `orthogonalize`, `scale_by_shape`, and Optax's weight decay and learning
    rate;
  * what changes the space or the storage of another transform is a *wrapper*:
    `galore(inner)`, `quantize_state(inner)`.

They nest with the mathematics inside, the space around it and the storage outermost:
`quantize_state(galore(chain(momentum, orthogonalize)))`.
"""

from nanochat_jax.transforms.adaptive import (
    Adaptive as Adaptive,
    AdaptiveState as AdaptiveState,
)
from nanochat_jax.transforms.axes import MatrixAxes as MatrixAxes
from nanochat_jax.transforms.galore import GaloreState as GaloreState, galore as galore
from nanochat_jax.transforms.momentum import (
    CorrectedMomentumState as CorrectedMomentumState,
    MomentumState as MomentumState,
    momentum as momentum,
)
from nanochat_jax.transforms.orthogonal import (
    ShapeScale as ShapeScale,
    orthogonalize as orthogonalize,
    scale_by_shape as scale_by_shape,
)
from nanochat_jax.transforms.quantize import (
    QuantizeState as QuantizeState,
    quantize_state as quantize_state,
)
from nanochat_jax.transforms.sequence import sequence as sequence
from nanochat_jax.transforms.stages import stages as stages
from nanochat_jax.transforms.storage import (
    QuantizationError as QuantizationError,
    dequantize as dequantize,
    quantization_error as quantization_error,
    quantize as quantize,
)
from nanochat_jax.transforms.subspace import project_gradients as project_gradients
from nanochat_jax.transforms.views import as_matrices as as_matrices
