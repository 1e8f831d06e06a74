"""Float32 weights from bfloat16 weights with their low bits, and back."""

from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, keystr
from jaxtyping import Array

from nanochat_jax.transforms.precision import pairs
from nanochat_jax.transforms.precision.short_leaves import is_short
from nanochat_jax.transforms.precision.split_master import SplitMasterState
from nanochat_jax.transforms.precision.wide import widened


def master_weights(state: optax.OptState, params: optax.Params) -> optax.Params:
    """Returns the float32 weights that `split_master` keeps.

    Example:
      >>> tx = optax.chain(optax.sgd(0.001), split_master())
      >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
      >>> updates, state = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> params["w"], master_weights(state, params)["w"]
      (Array([1, 1], dtype=bfloat16), Array([0.9989929, 0.9989929], dtype=float32))

    Args:
      state: State with a `split_master` anywhere within, or several, each for its part
        of the parameters.
      params: The parameters after the same step.

    Returns:
      A tree like the parameters: bfloat16 with low bits joined with these, other
      integers and floats of fewer than 32 bits cast to float32.

    Raises:
      ValueError: If the state has no `split_master`, two for one parameter, or low bits
        of other parameters than these.
    """
    low_bits = _low_bits(state, params)

    def whole(path: KeyPath, p: Array) -> Array:
        name = keystr(path)
        return pairs.join(p, low_bits[name]) if name in low_bits else widened(p)

    return jax.tree.map_with_path(whole, params)


def split_weights(
    state: optax.OptState, weights: optax.Params
) -> tuple[optax.Params, optax.OptState]:
    """Returns parameters and a state whose `master_weights` are the given weights.

    So training in bfloat16 starts from float32 weights without losing their low bits.

    Example:
      >>> tx = optax.chain(optax.sgd(0.001), split_master(bits=16))
      >>> weights = {"w": jnp.full(2, 0.1)}
      >>> state = tx.init(optax.tree.cast(weights, jnp.bfloat16))
      >>> params, state = split_weights(state, weights)
      >>> params["w"], master_weights(state, params)["w"]
      (Array([0.100098, 0.100098], dtype=bfloat16), Array([0.1, 0.1], dtype=float32))

    Args:
      state: State of a transform with `split_master` for the parameters in bfloat16.
      weights: Float32 weights, in a tree like the parameters.

    Returns:
      Parameters, in bfloat16 where the state has low bits for them and otherwise as
      given, and the state with their low bits.

    Raises:
      ValueError: As `master_weights`.
    """
    as_short = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    found = _low_bits(state, jax.tree.map(as_short, weights))
    low_bits: dict[str, Array] = {}

    def short(path: KeyPath, x: Array) -> Array:
        name = keystr(path)
        if name not in found:
            return x
        stored, low_bits[name] = pairs.split(x, 8 * found[name].dtype.itemsize)
        return stored

    params = jax.tree.map_with_path(short, weights)

    def replaced(node: Any) -> Any:
        if not _is_split(node):
            return node
        new = lambda path, _: low_bits[keystr(path)]
        return SplitMasterState(jax.tree.map_with_path(new, node.low_bits))

    return params, jax.tree.map(replaced, state, is_leaf=_is_split)


def _low_bits(state: optax.OptState, params: Any) -> dict[str, Array]:
    """Returns the low bits in a state, by paths of the parameters that they are of."""
    nodes = [x for x in jax.tree.leaves(state, is_leaf=_is_split) if _is_split(x)]
    if not nodes:
        raise ValueError(
            "The state of an optimizer with `split_master` is required, but there is "
            "no `SplitMasterState` in this one. What is restored without a target "
            "comes as plain dicts and lists: restore it into "
            "`jax.eval_shape(tx.init, params)`."
        )
    found = defaultdict(list)
    for node in nodes:
        for path, low in jax.tree.leaves_with_path(node.low_bits):
            found[keystr(path)].append(low)
    known = {keystr(path): x for path, x in jax.tree.leaves_with_path(params)}
    wrong = [
        f"  {name}: {reason}"
        for name, all_ in found.items()
        if (reason := _misfit(all_, known.get(name)))
    ]
    if wrong:
        raise ValueError(
            "The low bits of `split_master` do not fit the parameters:\n"
            + "\n".join(wrong)
            + "\nGive the state and the parameters of one step of one optimizer."
        )
    return {name: low for name, (low,) in found.items()}


def _misfit(low_bits: list[Array], param: Any) -> str | None:
    """Returns why the low bits for a parameter cannot be its own, if so."""
    if len(low_bits) > 1:
        return f"{len(low_bits)} `split_master` have low bits for it"
    if param is None:
        return "there is no such parameter"
    if low_bits[0].shape != param.shape:
        return f"low bits have shape {low_bits[0].shape}, the parameter {param.shape}"
    return None if is_short(param) else f"the parameter is {param.dtype}, not bfloat16"


def _is_split(node: Any) -> bool:
    return isinstance(node, SplitMasterState)
