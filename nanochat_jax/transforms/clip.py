"""Clip gradients by the norm of all of them."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from nanochat_jax.transforms import precision


def clip_by_global_norm(max_norm: ArrayLike) -> optax.GradientTransformation:
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
      A stateless transformation.
    """

    def update_fn(
        updates: optax.Updates, params: optax.Params | None = None
    ) -> optax.Updates:
        del params
        wide = jax.tree.map(_wide, updates)
        norm = optax.tree.norm(wide)
        within = norm < max_norm
        # Gradients of zeros are within.
        divisor = jnp.where(within, 1.0, norm)

        def clip(x: Array) -> Array:
            # Divided first, as Optax does, so that results agree to the last digit.
            return jnp.where(within, x, (x / divisor) * jnp.asarray(max_norm, x.dtype))

        return precision.cast_like(jax.tree.map(clip, wide), updates)

    return optax.stateless(update_fn)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
