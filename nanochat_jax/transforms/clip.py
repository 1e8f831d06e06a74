"""Clip gradients by the norm of all of them."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from nanochat_jax.transforms import precision


def clip_by_global_norm(
    max_norm: ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    """Scales updates down to a norm of at most `max_norm`.

    It is `optax.clip_by_global_norm` with a norm in float32: the square of a float16
    over 256 is infinite, and the update then zero.

    Example:
      >>> tx = clip_by_global_norm(1.0)
      >>> grads = {"w": jnp.full(4, 1000.0, jnp.float16)}
      >>> tx.update(grads, tx.init(grads))[0]["w"]
      Array([0.5, 0.5, 0.5, 0.5], dtype=float16)

    Args:
      max_norm: Largest norm of all updates together.

    Returns:
      A stateless transformation. Its `update` takes the extra argument `norm`: the norm
      of all updates, where those that are given are some of them.
    """

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        norm: Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        if norm is None:
            norm = jnp.sqrt(sum_of_squares(updates))
        within = norm < max_norm
        # Gradients of zeros are within.
        divisor = jnp.where(within, 1.0, norm)

        def scale(x: Array) -> Array:
            # Divided first, as Optax does, so that results agree to the last digit.
            x = _wide(x)
            return (x / divisor) * jnp.asarray(max_norm, x.dtype)

        def clip(x: Array) -> Array:
            if not _is_short(x):
                return jnp.where(within, x, scale(x))
            # A loop of one iteration or none, so that no float32 copy of all leaves is
            # made for the norm and kept.
            again = lambda _, x: scale(x).astype(x.dtype)
            return jax.lax.fori_loop(0, 1 - within.astype(jnp.int32), again, x)

        return precision.cast_like(jax.tree.map(clip, updates), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def sum_of_squares(tree: optax.Updates) -> Float[Array, ""]:
    """Returns the sum of the squares of all entries, in float32 at least.

    Args:
      tree: Real arrays.
    """
    squares = [jnp.sum(jnp.square(_wide(x))) for x in jax.tree.leaves(tree)]
    return sum(squares, jnp.zeros([], jnp.float32))


def _is_short(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
