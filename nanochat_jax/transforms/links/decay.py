"""Weight decay, plain or cautious."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from nanochat_jax.transforms import checks, precision


class DecayWeightsState(NamedTuple):
    """State of `decay_weights` with a schedule.

    Attributes:
      count: Steps taken.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]


def decay_weights(
    rate: optax.ScalarOrSchedule, *, cautious: bool = False, mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Adds a part of the weights to the updates, which are subtracted later.

    It stands before the learning rate, as `optax.add_decayed_weights` does. With
    `cautious` a weight decays only where its update, too, makes it smaller: where the
    two have one sign, or one of them is zero (Chen et al. 2025, "Cautious Weight
    Decay", arXiv:2510.12402). So decay never works against an update.

    Example:
      >>> tx = optax.chain(decay_weights(0.1, cautious=True), optax.scale(-1.0))
      >>> params = {"w": jnp.array([1.0, 1.0])}
      >>> updates, _ = tx.update({"w": jnp.array([1.0, -1.0])}, tx.init(params), params)
      >>> updates["w"]
      Array([-1.1,  1. ], dtype=float32)

    Args:
      rate: Part of the weights, or an Optax schedule.
      cautious: Whether only weights decay that the update makes smaller.
      mask: Leaves that decay, as for `optax.masked`; all if not given.

    Returns:
      A transformation whose state is empty, or a `DecayWeightsState` with a schedule.

    Raises:
      TypeError: At `init`, if a parameter is complex.
      ValueError: At `update`, if it is given no parameters.
    """

    def init_fn(params: optax.Params) -> Any:
        checks.require_real(params, "decay_weights")
        if callable(rate):
            return DecayWeightsState(jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        if callable(rate):
            checks.require_state(state, DecayWeightsState, "decay_weights")
            now = jnp.asarray(rate(state.count), jnp.float32)
            count = jnp.asarray(optax.safe_increment(state.count))
            state = DecayWeightsState(count)
        elif isinstance(rate, int | float) and rate == 0:
            return updates, state
        else:
            now = rate
        known = checks.require_params(params, "decay_weights")
        wide, weights = precision.widened(updates), precision.widened(known)

        def decayed(u: Array, w: Array) -> Array:
            part = now * w
            return u + (jnp.where(_agree(u, w), part, 0) if cautious else part)

        decayed_updates = jax.tree.map(decayed, wide, weights)
        return precision.cast_like(decayed_updates, updates), state

    tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return tx if mask is None else optax.masked(tx, mask)


def _agree(u: Array, w: Array) -> Array:
    """Returns where two have one sign; a product of small numbers would be zero."""
    return ((u >= 0) & (w >= 0)) | ((u <= 0) & (w <= 0))
