"""The mean gradient over microbatches.

Axes: A microbatches, B sequences, S tokens of a sequence.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32

from nanochat_jax.lm.model import Params

Loss = Callable[[Params, Array], Float32[Array, ""]]


def mean_gradient(
    loss_fn: Loss,
    params: Params,
    batch: Int32[Array, "A B S+1"],
    project: Callable[[optax.Updates], optax.Updates] = lambda grads: grads,
) -> tuple[Float32[Array, ""], optax.Updates]:
    """Returns mean loss and gradient over the microbatches, one at a time.

    They are added up in float32, whatever their type.

    Args:
      loss_fn: Loss of a microbatch, `[B, S + 1]`.
      params: Parameters of the model.
      batch: The microbatches.
      project: A linear map that each gradient goes through before it is added.
    """

    def evaluate(microbatch: Array) -> tuple[Array, optax.Updates]:
        loss, grads = jax.value_and_grad(loss_fn)(params, microbatch)
        return loss, project(grads)

    if batch.shape[0] == 1:
        return evaluate(batch[0])
    plus = lambda total, x: total + x.astype(total.dtype)
    add = lambda total, microbatch: (
        jax.tree.map(plus, total, evaluate(microbatch)),
        None,
    )
    like = jax.eval_shape(evaluate, batch[0])
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, sum_dtype(x)), like)
    total, _ = jax.lax.scan(add, zero, batch)
    mean = lambda total, x: (total / batch.shape[0]).astype(x.dtype)
    return jax.tree.map(mean, total, like)


def sum_dtype(x: Any) -> Any:
    """Returns the type in which arrays like `x` are added up."""
    return jnp.promote_types(x.dtype, jnp.float32)
