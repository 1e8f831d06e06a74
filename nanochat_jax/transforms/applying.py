"""Updates that are applied where they are made, and steps that may be left out."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool


class AppliesUpdates(optax.GradientTransformationExtraArgs):
    """A transformation whose `update` takes the extra argument `apply`.

    With `apply=True` it returns new parameters in place of updates, one group of leaves
    after another, written over the gradients. So neither float32 updates nor a second
    copy of the parameters of more than a group are ever there. What wraps it is an
    ordinary transformation again.
    """

    __slots__ = ()


def applying(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Adds the updates of `inner` to the parameters, if `apply=True` asks for it.

    It belongs inside `sequence`, whose groups then hold parameters when they are done.

    Example:
      >>> tx = applying(optax.sgd(0.5))
      >>> params = {"w": jnp.ones(2)}
      >>> tx.update({"w": jnp.ones(2)}, tx.init(params), params, apply=True)[0]["w"]
      Array([0.5, 0.5], dtype=float32)

    Args:
      inner: Transform to run.

    Returns:
      A transformation with the state of `inner`.
    """
    inner = optax.with_extra_args_support(inner)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        apply: bool = False,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = inner.update(updates, state, params, **extra_args)
        if apply and params is not None:
            return optax.apply_updates(params, updates), state
        return updates, state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def apply_gradients(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: optax.OptState,
    params: Any,
    **extra_args: Any,
) -> tuple[Any, optax.OptState]:
    """Returns parameters and state after one update, applied in place where it can be.

    Args:
      tx: The optimizer.
      grads: Gradients.
      state: Its state.
      params: Parameters.
      **extra_args: Extra arguments of `update`.
    """
    if isinstance(tx, AppliesUpdates):
        return tx.update(grads, state, params, apply=True, **extra_args)
    tx = optax.with_extra_args_support(tx)
    updates, state = tx.update(grads, state, params, **extra_args)
    return optax.apply_updates(params, updates), state


def apply_if(
    take: Bool[Array, ""],
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: optax.OptState,
    params: Any,
    **extra_args: Any,
) -> tuple[Any, optax.OptState]:
    """Returns parameters and state after one update, or as they are, to the bit.

    Args:
      take: Whether to apply the update.
      tx: The optimizer.
      grads: Gradients; they are written over.
      state: Its state.
      params: Parameters.
      **extra_args: Extra arguments of `update`.
    """

    def once(_: Array, carry: Any) -> Any:
        grads, state, params = carry
        new, state = apply_gradients(tx, grads, state, params, **extra_args)
        fits = lambda g, p: (g.shape, g.dtype) == (p.shape, p.dtype)
        spent = jax.tree.map(lambda g, p: p if fits(g, p) else g, grads, new)
        return spent, state, new

    # A loop of one iteration or none, in place of `lax.cond`: compilers update the
    # carry of a loop in place, but plan a second copy of the gradients for a branch.
    times = take.astype(jnp.int32)
    _, state, params = jax.lax.fori_loop(0, times, once, (grads, state, params))
    return params, state
