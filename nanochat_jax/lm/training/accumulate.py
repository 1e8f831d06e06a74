"""The mean gradient over microbatches.

Axes: A microbatches, B sequences, S tokens of a sequence.
"""

from collections.abc import Callable

import jax
import optax
from jaxtyping import Array, Float32, Int32

from nanochat_jax.lm.model import Params
from nanochat_jax.optimizer import mean_over

Loss = Callable[[Params, Array], Float32[Array, ""]]


def mean_gradient(
    loss_fn: Loss, params: Params, batch: Int32[Array, "A B S+1"]
) -> tuple[Float32[Array, ""], optax.Updates]:
    """Returns mean loss and gradient over the microbatches, one at a time.

    They are added up in float32, whatever their type.

    Args:
      loss_fn: Loss of a microbatch, `[B, S + 1]`.
      params: Parameters of the model.
      batch: The microbatches.
    """
    evaluate = jax.value_and_grad(loss_fn)
    return mean_over(lambda *args: (evaluate(*args), ()), params, batch)[0]
