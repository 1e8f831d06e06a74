"""Updates of at least a part of the weights' size."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from nanochat_jax.transforms import checks, precision
from nanochat_jax.transforms.sharding import in_auto_mode


def floor_updates(
    ratio: ArrayLike, *, by: Literal["matrix", "neuron"] = "matrix"
) -> optax.GradientTransformationExtraArgs:
    """Scales small updates up to `ratio` times the norm of their weights.

    With update `u` and weights `w` of a matrix, `u` becomes `u·max(1, ratio·‖w‖/‖u‖)`,
    with Frobenius norms. `by="neuron"` does so with the norms of the weights of each
    output neuron, one by one. Updates of zero, and those of weights of zero, stay.

    It stands after `orthogonalize` and `scale_by_shape` and before the learning rate,
    which so bounds the relative change of weights from below. The rule is the "u/w
    floor" of modded-nanogpt, track 3: 0.35 times the weights of a matrix at a learning
    rate of 0.0375 (pull request 274), later 0.3825 times those of each output neuron
    (328, where it was worth 18 of 2,700 steps, with the norms of weights fixed).

    Kernels are `[*batch, fan_in, fan_out]`, and an output neuron is a column, which
    that code, with weights `[out, in]`, calls a row.

    Example:
      >>> tx = floor_updates(0.5)
      >>> params = {"kernel": jnp.full((4, 4), 2.0)}
      >>> grads = {"kernel": jnp.full((4, 4), 0.25)}
      >>> tx.update(grads, tx.init(params), params)[0]["kernel"][0]
      Array([1., 1., 1., 1.], dtype=float32)

    Args:
      ratio: Smallest norm of an update over that of its weights.
      by: Norms of whole matrices, or of the weights of each output neuron.

    Returns:
      A transformation without state.

    Raises:
      ValueError: If `by` is neither; at `init` and `update`, if a leaf has fewer than
        two axes; at `update`, if it is given no parameters.
      TypeError: At `init`, if a leaf is complex.
    """
    if by not in ("matrix", "neuron"):
        raise ValueError(f'`by` must be "matrix" or "neuron", got {by!r}.')
    axes = (-2, -1) if by == "matrix" else -2

    def init_fn(params: optax.Params) -> optax.EmptyState:
        checks.require_matrices(params, "floor_updates")
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        params = checks.require_params(params, "floor_updates")
        norm = lambda x: jnp.linalg.norm(x, axis=axes, keepdims=True)

        def raised(u: Array, w: Array) -> Array:
            size, least = norm(u), ratio * norm(w)
            low = (size < least) & (size > 0)
            factor = jnp.where(low, least / jnp.where(low, size, 1), 1)
            return u * factor.astype(u.dtype)

        wide, weights = precision.widened(updates), precision.widened(params)
        return precision.cast_like(jax.tree.map(raised, wide, weights), updates), state

    return optax.GradientTransformationExtraArgs(init_fn, in_auto_mode(update_fn))
