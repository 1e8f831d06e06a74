"""Types of leaves: short floats widened at the start, results cast once at the end."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def in_float32(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on float32 updates, whatever the type of the gradients.

    In a plain chain each link returns the type it was given. In float16 that loses what
    is under 6e-8 between any two of them, and an epsilon of 1e-8 is zero. Here links
    pass float32 to each other, and only the result is cast.

    Example:
      >>> tx = in_float32(optax.scale_by_adam())
      >>> params = {"w": jnp.ones((8, 16), jnp.float16)}
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> updates["w"].dtype.name
      'float16'

    Args:
      inner: Transform to run.

    Returns:
      A transformation with the state that `inner` has for float32 parameters.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> optax.OptState:
        return inner.init(widened(params))

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        whole = None if params is None else widened(params)
        result, state = inner.update(widened(updates), state, whole, **extra_args)
        return cast_like(result, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def widened(tree: Any) -> Any:
    """Returns a tree with integers and floats of fewer than 32 bits in float32."""
    is_wide = lambda x: _is_inexact(x) and x.dtype.itemsize >= 4
    return jax.tree.map(lambda x: x if is_wide(x) else x.astype(jnp.float32), tree)


def inexact(tree: Any) -> Any:
    """Returns a tree with integers in float32, floats as they are."""
    return jax.tree.map(lambda x: x if _is_inexact(x) else x.astype(jnp.float32), tree)


def cast_like(tree: Any, like: Any) -> Any:
    """Returns updates in the types of gradients, if these are not integers.

    Updates for integers stay as they are: cast, most would be zero.

    Args:
      tree: Updates.
      like: Gradients.
    """
    cast = lambda x, y: x.astype(y.dtype) if _is_inexact(y) else x
    return jax.tree.map(cast, tree, like)


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)
