"""Learning rates in force, from a state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey
from jaxtyping import Array, Float

from nanochat_jax.interop import as_arrays
from nanochat_jax.transforms import record


def learning_rates(
    tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params
) -> dict[str, Float[Array, ""]]:
    """Returns the learning rate of the next update, by label of the parameters.

    Example:
      >>> params = {"up": {"kernel": jnp.ones((64, 256)), "bias": jnp.zeros(256)}}
      >>> tx = muon(optax.linear_schedule(0.02, 0.0, 100))
      >>> learning_rates(tx, tx.init(params), params)
      {'matrix': Array(0.02, dtype=float32), 'vector': Array(0.003, dtype=float32)}

    Args:
      tx: `muon` or `build_optimizer`, also in a chain or a wrapper.
      state: Its state, which counts the steps of schedules; it may be traced.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      Learning rates by label, of the labels that parameters have.

    Raises:
      ValueError: If `tx` is another transformation, or the state holds its rates
        itself, as that of `optax.inject_hyperparams` does.
    """
    told = record.recorded_init(tx, as_arrays(params))[1]
    if not told.optimizers:
        raise ValueError(
            "`learning_rates` reads the rates of `muon` and `build_optimizer`, got "
            "another transformation."
        )
    if optax.tree.get_all_with_path(state, "hyperparams"):
        raise ValueError(
            "the state is that of `optax.inject_hyperparams`, which holds the rates "
            'itself. Read them by `optax.tree.get(state, "hyperparams")`.'
        )
    labels = {role.label for role in told.roles.values()}
    return {
        label: _in_force(note.rate, label, state)
        for label, note in told.optimizers.items()
        if label in labels and note.rate is not None
    }


def _in_force(rate: Any, label: str, state: optax.OptState) -> Array:
    if not callable(rate):
        return jnp.asarray(rate, jnp.float32)
    is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)
    nodes = jax.tree.leaves_with_path(state, is_leaf=is_schedule)
    counts = [
        node.count
        for path, node in nodes
        if is_schedule(node) and DictKey(label) in path
    ]
    return jnp.asarray(rate(counts[0]), jnp.float32)
