"""Momentum as an exponential moving average."""

from typing import Any, NamedTuple

import jax
import optax
from jax.typing import ArrayLike


class MomentumState(NamedTuple):
    """State of `momentum`.

    Attributes:
      momentum: Moving average of the updates, shaped as the parameters.
    """

    momentum: optax.Updates


def momentum(
    beta: ArrayLike = 0.95, *, nesterov: bool = True, dtype: str = "float32"
) -> optax.GradientTransformation:
    """Replaces updates by their exponential moving average.

    With gradient `g` and state `m`, computes `m ← βm + (1-β)g` and returns `m`, or with
    `nesterov` the average one step ahead, `βm + (1-β)g` with the new `m`, as Muon does
    (Jordan 2024). There is no correction of the early bias: orthogonalisation divides
    the scale out.

    Example:
      >>> tx = momentum(0.9, nesterov=False)
      >>> params = {"w": jnp.ones(3)}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> updates["w"]
      Array([0.1, 0.1, 0.1], dtype=float32)

    Args:
      beta: Decay `β` of the average.
      nesterov: Whether to look one step ahead.
      dtype: Type of the state, whatever the type of the parameters.

    Returns:
      A transformation whose state is a `MomentumState`.
    """

    def init_fn(params: optax.Params) -> MomentumState:
        return MomentumState(optax.tree.zeros_like(params, dtype=dtype))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, MomentumState]:
        del params
        average = lambda g, m: beta * m + (1 - beta) * g.astype(m.dtype)
        # A traced `beta` must not change the type of the state.
        m = jax.tree.map(
            lambda g, m: average(g, m).astype(m.dtype), updates, state.momentum
        )
        ahead = jax.tree.map(average, updates, m) if nesterov else m
        return optax.tree.cast_like(ahead, updates), MomentumState(m)

    return optax.GradientTransformation(init_fn, update_fn)
