"""Gradient transformations, and the one law by which they compose.

In `optax.chain` every stage is initialised with the full-size parameters and stages
share no state. Therefore:

  * a transform that keeps the shape of updates and the storage of state is a *link* of
    a chain: `momentum`, `orthogonalize`, `scale_by_shape`, and Optax's weight decay and
    learning rate;
  * a transform that changes the view, the space or the storage of another is a
    *wrapper*: `as_matrices(inner)`, `galore(inner)`, `quantize_state(inner)`.

They nest with the mathematics inside, the space around it, then the view, and the
storage outermost: `quantize_state(galore(chain(momentum, orthogonalize)))`. The links
of precision, `round_updates` and `split_master`, stand last in the chain.

momentum       exponential average of gradients
orthogonalize  Newton-Schulz on updates, and factors by shape
as_matrices    leaves of any shape seen as matrices; `axes` describes the view
quantize       state in few bits; `plain_states` reads and converts such states
galore/        a low-rank space of the gradient
links/         further links of a chain
precondition/  updates scaled in the eigenbases of their gradients
scheduling/    groups of leaves one after another, which bounds temporaries
owners/        whole matrices, each on the device that owns it
sharding/      the same transforms on a mesh of devices
applying       updates applied where they are made
precision/     float32 inside, whatever the type of gradients; weights in bfloat16
clip           gradients by the norm of all
stages         a named chain with a plain dict for a state
state_paths    parameter and field of a leaf of a state
record         facts that transforms tell at `init`
checks         refusals of complex leaves and foreign states
"""

from nanochat_jax.transforms import owners as owners, record as record
from nanochat_jax.transforms.applying import (
    AppliesUpdates as AppliesUpdates,
    apply_gradients as apply_gradients,
    apply_if as apply_if,
    applying as applying,
)
from nanochat_jax.transforms.as_matrices import (
    as_matrices as as_matrices,
    is_axes as is_axes,
    is_function as is_function,
    nearest as nearest,
    seen_by as seen_by,
)
from nanochat_jax.transforms.axes import (
    MatrixAxes as MatrixAxes,
    ResolvedAxes as ResolvedAxes,
    as_axes as as_axes,
)
from nanochat_jax.transforms.checks import require_state as require_state
from nanochat_jax.transforms.clip import (
    clip_by_global_norm as clip_by_global_norm,
    sum_of_squares as sum_of_squares,
)
from nanochat_jax.transforms.galore import (
    Basis as Basis,
    GaloreState as GaloreState,
    RandomizedSVD as RandomizedSVD,
    Rank as Rank,
    check_rank as check_rank,
    galore as galore,
    projection as projection,
    saves_bytes as saves_bytes,
)
from nanochat_jax.transforms.links import (
    AverageWeightsState as AverageWeightsState,
    DecayWeightsState as DecayWeightsState,
    NormalizeRowsState as NormalizeRowsState,
    average_weights as average_weights,
    averaged_weights as averaged_weights,
    decay_weights as decay_weights,
    fix_norms as fix_norms,
    floor_updates as floor_updates,
    normalize_rows as normalize_rows,
)
from nanochat_jax.transforms.momentum import (
    CorrectedMomentumState as CorrectedMomentumState,
    MomentumState as MomentumState,
    momentum as momentum,
)
from nanochat_jax.transforms.orthogonalize import (
    ShapeScale as ShapeScale,
    orthogonalize as orthogonalize,
    scale_by_shape as scale_by_shape,
)
from nanochat_jax.transforms.owners import (
    owned as owned,
    per_leaf as per_leaf,
    restacked as restacked,
)
from nanochat_jax.transforms.plain_states import (
    QuantizationError as QuantizationError,
    dequantize as dequantize,
    quantization_error as quantization_error,
    quantize as quantize,
)
from nanochat_jax.transforms.precision import (
    RoundUpdatesState as RoundUpdatesState,
    SplitMasterState as SplitMasterState,
    in_float32 as in_float32,
    master_weights as master_weights,
    round_updates as round_updates,
    split_master as split_master,
    split_weights as split_weights,
    widened as widened,
)
from nanochat_jax.transforms.precondition import (
    PowerStep as PowerStep,
    PreconditionState as PreconditionState,
    precondition as precondition,
)
from nanochat_jax.transforms.quantize import (
    QuantizeState as QuantizeState,
    quantize_state as quantize_state,
)
from nanochat_jax.transforms.scheduling import (
    Parts as Parts,
    after as after,
    by_rows as by_rows,
    group_by_shape as group_by_shape,
    group_bytes as group_bytes,
    in_pieces as in_pieces,
    rows_at_a_time as rows_at_a_time,
    run_after as run_after,
    sequence as sequence,
)
from nanochat_jax.transforms.sharding import (
    Placement as Placement,
    from_bits as from_bits,
    is_owned as is_owned,
    laid_out as laid_out,
    placement as placement,
    plan as plan,
    specs as specs,
    to_bits as to_bits,
)
from nanochat_jax.transforms.stages import stages as stages
from nanochat_jax.transforms.state_paths import Place as Place, locate as locate
