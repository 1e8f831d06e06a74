"""Learning rates in force, from a state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nanochat_jax.interop import as_arrays
from nanochat_jax.optimizer.roles import Role
from nanochat_jax.transforms import record

_LABELS = ("matrix", "embedding", "head", "vector")


def learning_rates(
    tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params
) -> dict[str, Float[Array, ""]]:
    """Returns the learning rate of the next update, by label of the parameters.

    Example:
      >>> params = {"up": {"kernel": jnp.ones((64, 256)), "bias": jnp.zeros(256)}}
      >>> tx = muon(optax.linear_schedule(0.02, 0.0, 100))
      >>> learning_rates(tx, tx.init(params), params)
      {'vector': Array(0.003, dtype=float32), 'matrix': Array(0.02, dtype=float32)}

    Args:
      tx: `muon` or `build_optimizer`, also in a chain or a wrapper.
      state: Its state, which counts the steps of schedules; it may be traced.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      Learning rates by label, of the labels that parameters have; of groups by label
      and pattern, such as `"head lm_head"`.

    Raises:
      ValueError: If `tx` is another transformation, or has two of them; if the state is
        not one of `tx`, or holds the rates itself, as that of
        `optax.inject_hyperparams` does.
    """
    told = record.recorded_init(tx, as_arrays(params))[1]
    if not told.optimizers:
        raise ValueError(
            "`learning_rates` reads the rates of `muon` and `build_optimizer`, got "
            "another transformation."
        )
    injected = lambda node: hasattr(node, "hyperparams")
    nodes = jax.tree.leaves(state, is_leaf=injected)
    if any(_parts(node.inner_state) for node in nodes if injected(node)):
        raise ValueError(
            "the state is that of `optax.inject_hyperparams`, which holds the rates "
            'itself. Read them by `optax.tree.get(state, "hyperparams")`.'
        )
    parts = _parts(state)
    if len(parts) != 1:
        raise ValueError(
            f"the state is that of {len(parts)} optimizers by `muon` or "
            "`build_optimizer`, not of one. Give each with its own part of the state. "
            "A state that was restored as plain dicts counts as none: restore it into "
            "`jax.eval_shape(tx.init, params)`."
        )
    notes = {_name(role): told.optimizers[path] for path, role in told.roles.items()}
    return {
        name: _in_force(note.rate, parts[0].inner_states[note.part])
        for name, note in notes.items()
        if note is not None and note.rate is not None
    }


def _name(role: Role) -> str:
    """Returns the label of a parameter, and the group that it is in."""
    return f"{role.label} {role.group.match}" if role.group else role.label


def _parts(state: optax.OptState) -> list[optax.PartitionState]:
    """Returns the states of partitions by Muon's labels."""
    is_part = lambda node: isinstance(node, optax.PartitionState)
    found = [x for x in jax.tree.leaves(state, is_leaf=is_part) if is_part(x)]
    return [
        part
        for x in found
        for part in ([x] if {*_LABELS} <= {*x.inner_states} else _parts(x.inner_states))
    ]


def _in_force(rate: Any, state: optax.OptState) -> Array:
    if not callable(rate):
        return jnp.asarray(rate, jnp.float32)
    is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)
    nodes = jax.tree.leaves(state, is_leaf=is_schedule)
    counts = [node.count for node in nodes if is_schedule(node)]
    if not counts:
        raise ValueError(
            "the state counts no steps of a schedule: it is that of another optimizer, "
            "whose learning rate is a number."
        )
    return jnp.asarray(rate(counts[0]), jnp.float32)
