"""One transform for each group of leaves, and one state for all of them."""

from collections.abc import Hashable, Mapping
from typing import Any

import jax
import optax
from jax.tree_util import keystr

from nanochat_jax.codecs import is_quantized
from nanochat_jax.transforms import fill, only, owners_of


def by_group(
    variants: Mapping[Any, optax.GradientTransformation],
    chosen: Mapping[str, Hashable],
) -> optax.GradientTransformationExtraArgs:
    """Runs one of several transforms, which differ in numbers alone, on each leaf.

    Unlike that of `optax.partition`, the state is the one that a single transform has
    for all leaves: it does not tell which of them was run on a leaf, and may be used
    with other groups.

    Example:
      >>> variants = {"slow": optax.sgd(0.5), "fast": optax.sgd(2.0)}
      >>> tx = by_group(variants, {"['a']": "slow", "['b']": "fast"})
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> updates["a"], updates["b"]
      (Array([-0.5, -0.5], dtype=float32), Array([-2., -2.], dtype=float32))

    Args:
      variants: Transforms by name, whose states have the same structure. Each must
        treat every leaf by itself.
      chosen: Name of the transform by path of a leaf, as `jax.tree_util.keystr` has it.

    Returns:
      A transformation with the state of any of them.
    """
    txs = {name: optax.with_extra_args_support(tx) for name, tx in variants.items()}
    first = next(iter(txs.values()))
    if len(txs) == 1:
        return first

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        flat, treedef = jax.tree.flatten_with_path(updates)
        names = [keystr(path) for path, _ in flat]
        leaves = [x for _, x in flat]
        weights = None if params is None else treedef.flatten_up_to(params)
        nodes, state_def = jax.tree.flatten(state, is_leaf=is_quantized)
        owners = owners_of(state, updates)
        new_leaves, new_nodes = list(leaves), list(nodes)
        # Counts are in every part, and are the same after each.
        present = [name for name in txs if name in {chosen[leaf] for leaf in names}]
        for name in present or [next(iter(txs))]:
            mine = {leaf for leaf in names if chosen[leaf] == name}
            is_mine = [leaf in mine for leaf in names]
            result, new_state = txs[name].update(
                treedef.unflatten(only(leaves, is_mine)),
                state_def.unflatten(
                    only(nodes, [o is None or o in mine for o in owners])
                ),
                None if weights is None else treedef.unflatten(only(weights, is_mine)),
                **extra_args,
            )
            fill(new_leaves, treedef.flatten_up_to(result))
            fill(new_nodes, state_def.flatten_up_to(new_state))
        return treedef.unflatten(new_leaves), state_def.unflatten(new_nodes)

    return optax.GradientTransformationExtraArgs(first.init, update_fn)
