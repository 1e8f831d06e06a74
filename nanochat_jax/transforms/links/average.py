"""Averages of weights over the last steps, kept as differences from the weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr
from jax.typing import ArrayLike
from jaxtyping import Array, Int32

from nanochat_jax.codecs import is_quantized
from nanochat_jax.transforms import checks, precision, record
from nanochat_jax.transforms.state_paths import locate


class AverageWeightsState(NamedTuple):
    """State of `average_weights`.

    Attributes:
      count: Steps taken.
      average: Average minus weights, in float32, shaped as the parameters.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    average: optax.Params


def average_weights(
    start: int = 0, horizon: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Keeps an average of the weights, and leaves the updates as they are.

    After step `start + n` the average is the mean of the weights after each of these
    `n` steps, and once `n` is over `horizon` an exponential one in which the latest
    weights count `1 / horizon` (Polyak and Juditsky 1992; as a read-out over the tail
    of training in modded-nanogpt, track 3, pull request 325, worth 42 of 2,700 steps).
    Up to `start` it is the weights.

    The state is the difference `d` of average and weights. With update `u`, and the
    latest weights counting `a`, it is `d ← (1 - a)(d - u)`: the weights themselves are
    not needed. It is small beside them, so that `quantize_state` stores it well in 8
    bits; round stochastically, or what a late small update adds is lost.

    It is the last of all links, after `round_updates` and `split_master`, whose updates
    are those that weights really make. `averaged_weights` reads the average.

    Example:
      >>> tx = optax.chain(optax.sgd(1.0), average_weights())
      >>> params = {"w": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update({"w": -jnp.ones(2)}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params["w"], averaged_weights(tx, state, params)["w"]  # of 1, 2 and 3
      (Array([3., 3.], dtype=float32), Array([2., 2.], dtype=float32))

    Args:
      start: Steps before the first weights that count.
      horizon: Steps after which the mean becomes exponential; never if not given.

    Returns:
      A transformation whose state is an `AverageWeightsState`.

    Raises:
      TypeError: At `init`, if a parameter is complex.
      ValueError: If `start` is below 0, or `horizon` below 1.
    """
    if start < 0 or (horizon is not None and horizon < 1):
        raise ValueError(
            "`start` of `average_weights` must be at least 0 and `horizon` at least 1, "
            f"got {start} and {horizon}."
        )

    def init_fn(params: optax.Params) -> AverageWeightsState:
        checks.require_real(params, "average_weights")
        names = [keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
        record.tell(averages={name: record.view_of(name) for name in names})
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        return AverageWeightsState(jnp.zeros([], jnp.int32), zeros)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AverageWeightsState]:
        del params, extra_args
        checks.require_state(state, AverageWeightsState, "average_weights")
        count = jnp.asarray(optax.safe_increment(state.count))
        counted = jnp.maximum(count - start, 1).astype(jnp.float32)
        most = counted if horizon is None else jnp.minimum(counted, horizon)
        kept = (1 - 1 / most).astype(jnp.float32)
        step = lambda d, u: kept * (d - u.astype(jnp.float32))
        average = jax.tree.map(step, state.average, updates)
        return updates, AverageWeightsState(count, average)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def averaged_weights(
    tx: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    share: ArrayLike = 1.0,
) -> optax.Params:
    """Returns the average of the weights that `average_weights` keeps.

    Args:
      tx: Optimizer with `average_weights` anywhere within, or several, each for its
        part of the parameters.
      state: Its state.
      params: The parameters after the same step.
      share: Part of the average, with the rest of the parameters themselves. A part of
        0.6 was better than all of it, which lags (pull request 328, as above).

    Returns:
      A tree like the parameters: the average, in float32 where they have fewer bits,
      and parameters without an average as they are.

    Raises:
      ValueError: If the state has no average.
    """
    views = record.recorded_init(tx, params)[1].averages
    places = locate(state, params)
    found: dict[str, Array] = {}
    for path, node in jax.tree.leaves_with_path(state, is_leaf=is_quantized):
        place = places[keystr(path)]
        if place.name is not None and place.fields[-1:] == ["average"]:
            d = node.decode() if is_quantized(node) else node
            view = views.get(place.name)
            found[place.name] = d if view is None else view.from_view(d)
    if not found:
        raise ValueError(
            "the state of an optimizer with `average_weights` is required, but this "
            "one has none. What is restored without a target comes as plain dicts and "
            "lists: restore it into `jax.eval_shape(tx.init, params)`."
        )

    def whole(path: Any, p: Array) -> Array:
        d = found.get(keystr(path))
        return p if d is None else precision.widened(p) + share * d

    return jax.tree.map_with_path(whole, params)
