"""One transform for each group of leaves, and one state for all of them."""

from collections.abc import Hashable, Mapping
from typing import Any

import optax

from nanochat_jax.transforms import Parts


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
        parts = Parts.of(updates, state, params)
        done, groups = parts, {chosen[name] for name in parts.names}
        # Counts are in every part, and are the same after each.
        for group in [name for name in txs if name in groups] or [next(iter(txs))]:
            mine = {name for name in parts.names if chosen[name] == group}
            done = done.replaced(txs[group].update(*parts.some(mine), **extra_args))
        return done.whole()

    return optax.GradientTransformationExtraArgs(first.init, update_fn)
