"""Momentum as an exponential moving average."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from nanochat_jax.transforms import checks, precision


class MomentumState(NamedTuple):
    """State of `momentum`.

    Attributes:
      momentum: Moving average of the updates, shaped as the parameters.
    """

    momentum: optax.Updates


class CorrectedMomentumState(NamedTuple):
    """State of `momentum` that counts steps: with a schedule, or bias correction.

    Attributes:
      count: Steps taken.
      momentum: Moving average of the updates, shaped as the parameters.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    momentum: optax.Updates


def momentum(
    beta: optax.ScalarOrSchedule = 0.95,
    *,
    nesterov: bool = True,
    bias_correction: bool = False,
    dtype: str = "float32",
) -> optax.GradientTransformation:
    """Replaces updates by their exponential moving average.

    With gradient `g` and state `m`, computes `m ← βm + (1-β)g` and returns `m`, or with
    `nesterov` the average one step ahead, `βm + (1-β)g` with the new `m`, as Muon does
    (Jordan 2024). The average starts at zero and so is too small at first. To plain
    Muon this makes no difference, since orthogonalisation divides the scale out; with
    `nesterov` it weights the two terms a little otherwise for some tens of steps.

    Example:
      >>> tx = momentum(0.9, nesterov=False)
      >>> params = {"w": jnp.ones(3)}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> updates["w"]
      Array([0.1, 0.1, 0.1], dtype=float32)

    Args:
      beta: Decay `β` of the average, or an Optax schedule, such as a warm-up.
      nesterov: Whether to look one step ahead.
      bias_correction: Whether to divide `m` by `1 - βᵗ` after `t` steps, and with
        `nesterov` its two terms by `1 - βᵗ⁺¹` and `1 - βᵗ`, as `optax.contrib.muon`
        does.
      dtype: Type of the state, whatever the type of the parameters.

    Returns:
      A transformation whose state is a `MomentumState`, or with `bias_correction` or a
      schedule a `CorrectedMomentumState`.

    Raises:
      ValueError: If `bias_correction` is to correct the bias of a schedule.
    """
    counts = bias_correction or callable(beta)
    if bias_correction and callable(beta):
        raise ValueError(
            "`bias_correction` of `momentum` divides by `1 - βᵗ` and needs one number "
            "`beta`, got a schedule. Leave one of the two out."
        )

    def init_fn(params: optax.Params) -> MomentumState | CorrectedMomentumState:
        checks.require_real(params, "momentum")
        zeros = optax.tree.zeros_like(params, dtype=dtype)
        if counts:
            return CorrectedMomentumState(jnp.zeros([], jnp.int32), zeros)
        return MomentumState(zeros)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, MomentumState | CorrectedMomentumState]:
        del params
        checks.require_state(state, (MomentumState, CorrectedMomentumState), "momentum")
        now = beta(state.count) if callable(beta) else beta
        average = lambda g, m: now * m + (1 - now) * g.astype(m.dtype)
        # A traced `beta` must not change the type of the state.
        m = jax.tree.map(
            lambda g, m: average(g, m).astype(m.dtype), updates, state.momentum
        )
        if not bias_correction:
            ahead = jax.tree.map(average, updates, m) if nesterov else m
            ahead = precision.cast_like(ahead, updates)
            if not counts:
                return ahead, MomentumState(m)
            count = jnp.asarray(optax.safe_increment(state.count))
            return ahead, CorrectedMomentumState(count, m)
        count = jnp.asarray(optax.safe_increment(state.count))
        bias = lambda steps: (1 - now**steps).astype(dtype)
        first, later = bias(count), bias(count + 1)
        ahead = jax.tree.map(lambda m: m / first, m)
        if nesterov:
            term = lambda g, m: average(g.astype(m.dtype) / first, m / later)
            ahead = jax.tree.map(term, updates, m)
        return precision.cast_like(ahead, updates), CorrectedMomentumState(count, m)

    return optax.GradientTransformation(init_fn, update_fn)
