"""Training steps that update each layer in the backward pass.

step          `update_in_backward`
loop          the backward pass, which updates a layer at a time
passes        forward and backward pass, a layer at a time
updates       updates of one part of the parameters after another
layout        arrays of a state that belong to a layer
stacked       trees of stacked arrays
by_part       two optimizers in one
microbatches  means over microbatches
"""

from nanochat_jax.optimizer.backward.microbatches import (
    mean_over as mean_over,
    sum_dtype as sum_dtype,
)
from nanochat_jax.optimizer.backward.step import (
    BackwardStep as BackwardStep,
    StepReport as StepReport,
    update_in_backward as update_in_backward,
)
