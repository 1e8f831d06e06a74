"""Links: transforms of a chain that keep the shape of updates.

average         averages of weights over the last steps
decay           weight decay, plain or cautious
fixed_norm      matrices that keep their norm
floor           updates of at least a part of the weights' size
normalize_rows  neurons of equal size, before or after orthogonalisation
"""

from nanochat_jax.transforms.links.average import (
    AverageWeightsState as AverageWeightsState,
    average_weights as average_weights,
    averaged_weights as averaged_weights,
)
from nanochat_jax.transforms.links.decay import (
    DecayWeightsState as DecayWeightsState,
    decay_weights as decay_weights,
)
from nanochat_jax.transforms.links.fixed_norm import fix_norms as fix_norms
from nanochat_jax.transforms.links.floor import floor_updates as floor_updates
from nanochat_jax.transforms.links.normalize_rows import (
    NormalizeRowsState as NormalizeRowsState,
    normalize_rows as normalize_rows,
)
