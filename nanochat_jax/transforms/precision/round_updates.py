"""Updates that land on bfloat16 weights by stochastic rounding."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, keystr
from jax.typing import ArrayLike
from jaxtyping import Array, Int32, PRNGKeyArray

from nanochat_jax.numerics import hashing
from nanochat_jax.transforms import checks
from nanochat_jax.transforms.precision import pairs
from nanochat_jax.transforms.precision.short_leaves import is_short, require_params
from nanochat_jax.transforms.sharding import Entries


class RoundUpdatesState(NamedTuple):
    """State of `round_updates`.

    Attributes:
      count: Steps taken.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]


def round_updates(seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """Rounds updates of bfloat16 weights up or down at random, right in the mean.

    A bfloat16 has 8 significant bits. To nearest, an update under 2⁻⁹ of a weight is
    lost, however often it comes. With stochastic rounding (Zamirai et al. 2020,
    "Revisiting BFloat16 Training") the sum of weight and update goes to either of the
    two bfloat16 around it, to the nearer one the more often, so that many small updates
    move weights as far as in float32.

    It is the last link of a chain, after the learning rate and outside
    `quantize_state`, since its updates are float32: the difference of the new weight
    and the old, which `optax.apply_updates` adds without another rounding. Parameters
    of 32 bits and more pass through. `update` takes the extra argument `layer`, the
    index on the first axis of a stacked leaf of the first entry of what it is given:
    an update of a part is that part of an update of the whole.

    Example:
      >>> tx = optax.chain(optax.sgd(1e-4), round_updates())
      >>> params = {"w": jnp.ones(100_000, jnp.bfloat16)}
      >>> updates, _ = tx.update({"w": jnp.ones(100_000)}, tx.init(params), params)
      >>> round(float(updates["w"].mean()), 5)
      -0.0001
      >>> jnp.unique(optax.apply_updates(params, updates)["w"])
      Array([0.996094, 1], dtype=bfloat16)

    Args:
      seed: Seed of the rounding, which is keyed by seed, step, leaf and position.

    Returns:
      A transformation whose state is a `RoundUpdatesState`.

    Raises:
      TypeError: At `init` and `update`, if a parameter is a float of fewer than 32 bits
        but not bfloat16.
      ValueError: At `update`, if it is given no parameters.
    """

    def init_fn(params: optax.Params) -> RoundUpdatesState:
        require_params(params, "round_updates")
        return RoundUpdatesState(jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        layer: ArrayLike = 0,
        entries: Mapping[str, Entries] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RoundUpdatesState]:
        del extra_args
        params = require_params(params, "round_updates")
        checks.require_state(state, RoundUpdatesState, "round_updates")

        def rounded(path: KeyPath, weight: Array, update: Array) -> Array:
            if not is_short(weight):
                return update
            # One key must not serve two random draws, here and in another transform.
            name, prefix = keystr(path), "round_updates"
            if entries and name in entries:
                own = (seed, state.count, prefix, layer, weight.shape)
                return jax.vmap(_rounded)(entries[name].keys(*own), weight, update)
            start = hashing.start_of(layer, weight.shape)
            key = hashing.leaf_key(seed, state.count, f"{prefix}{name}", start)
            return _rounded(key, weight, update)

        updates = jax.tree.map_with_path(rounded, params, updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, RoundUpdatesState(count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rounded(key: PRNGKeyArray, weight: Array, update: Array) -> Array:
    """Returns an update of a bfloat16 weight that leads to another."""
    weight = pairs.widen(weight)
    total = pairs.total(weight, update.astype(jnp.float32))
    rounded = pairs.dithered(total, hashing.uniform(key, weight.shape))
    return jnp.where(jnp.isfinite(total), rounded - weight, total)
