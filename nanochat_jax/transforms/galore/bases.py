"""The bases of all leaves of a tree: which are renewed at a step, and what follows."""

from collections.abc import Collection, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr
from jaxtyping import Array

from nanochat_jax.transforms.galore.adaptive import AdaptiveState
from nanochat_jax.transforms.galore.basis import Leaf, Refresh
from nanochat_jax.transforms.scheduling import group_by_shape, group_bytes
from nanochat_jax.transforms.sharding import placement
from nanochat_jax.transforms.state_paths import locate


def change_bases(
    refresh: Refresh, reproject: Collection[str], updates: Any, state: Any
) -> tuple[Any, dict[str, tuple[Array, Array]]]:
    """Renews the bases of the leaves that are due.

    Returns:
      The state of `galore` with other bases, and first moments moved to these; and by
      path whether a basis was renewed and how much of the one before it spans.
    """
    flat, treedef = jax.tree.flatten_with_path(updates)
    names = [keystr(path) for path, _ in flat]
    bases = treedef.flatten_up_to(state.projector)
    memories = _by_leaf(treedef, state.adaptive)
    inner, inner_def = jax.tree.flatten(state.inner)
    rest, rest_def = jax.tree.flatten(state.rest)
    owned = _moments_by_parameter(state.inner, updates, reproject)
    owned_rest = _moments_by_parameter(state.rest, updates, reproject)
    if any(len(owned.get(name, ())) != len(x) for name, x in owned_rest.items()):
        owned_rest = {}  # They are not of one kind, so they stay apart.
    leaves = {
        i: Leaf(
            g,
            refresh.is_due(state.count, names[i], memories[i]),
            refresh.sketch_seed(state.count, names[i]),
            bases[i],
            tuple(inner[j] for j in owned.get(names[i], ())),
            tuple(rest[j] for j in owned_rest.get(names[i], ())),
        )
        for i, (_, g) in enumerate(flat)
        if bases[i] is not None
    }
    renewal, places = {}, [placement.of(*leaf) for leaf in flat]
    for group in _alike(leaves, places):
        renewed = refresh.renew([leaves[i] for i in group], places[group[0]])
        for i, new in zip(group, renewed, strict=True):
            bases[i], renewal[names[i]] = new.basis, (leaves[i].due, new.overlap)
            for j, m in zip(owned.get(names[i], ()), new.moments, strict=True):
                inner[j] = m
            for j, m in zip(owned_rest.get(names[i], ()), new.rests, strict=True):
                rest[j] = m
    state = state._replace(
        projector=treedef.unflatten(bases),
        inner=inner_def.unflatten(inner),
        rest=rest_def.unflatten(rest),
    )
    return state, renewal


def _alike(leaves: dict[int, Leaf], places: Sequence[Hashable]) -> list[list[int]]:
    """Groups leaves whose gradients and bases have one shape, in one place."""
    ids = list(leaves)
    groups = group_by_shape(
        [leaves[i].gradient for i in ids],
        group_bytes(),
        kinds=[(leaves[i].basis.shape, places[i]) for i in ids],
    )
    return [[ids[k] for k in group] for group in groups]


def observe(
    refresh: Refresh,
    state: Any,
    updates: Any,
    low_rank: Any,
    renewal: dict[str, tuple[Array, Array]],
) -> AdaptiveState | None:
    """Returns what adaptive refreshing remembers after a step."""
    if refresh.adaptive is None:
        return None
    flat, treedef = jax.tree.flatten_with_path(updates)
    memories = _by_leaf(treedef, state.adaptive)
    for i, ((path, g), low) in enumerate(zip(flat, jax.tree.leaves(low_rank))):  # noqa: B905
        name = keystr(path)
        if name in renewal:
            memories[i] = refresh.adaptive.observe(
                memories[i],
                state.count,
                refresh.every,
                *renewal[name],
                _captured(low, g),
            )
    columns = [
        [m and getattr(m, field) for m in memories] for field in AdaptiveState._fields
    ]
    return AdaptiveState(*(treedef.unflatten(column) for column in columns))


def _captured(low: Array, g: Array) -> Array:
    """Returns the share of a gradient's energy in the basis, -1 of one of zeros."""
    g = g.astype(jnp.float32)
    # Divided out first, so that no square over- or underflows.
    largest = jnp.max(jnp.abs(g))
    unit = jnp.where(largest > 0, largest, 1.0)
    energy = lambda x: jnp.sum(jnp.square(x / unit))
    whole = jnp.where(largest > 0, energy(g), 1.0)
    return jnp.where(largest > 0, energy(low) / whole, -1.0)


def _by_leaf(treedef: Any, memory: AdaptiveState | None) -> list[Any]:
    """Returns the entries of each leaf, `None` for one that is not projected."""
    if memory is None:
        return [None] * treedef.num_leaves
    rows = zip(*(treedef.flatten_up_to(tree) for tree in memory), strict=True)
    return [None if row[0] is None else AdaptiveState(*row) for row in rows]


def _moments_by_parameter(
    state: optax.OptState, updates: Any, fields: Collection[str]
) -> dict[str, list[int]]:
    """Returns, by parameter path, which leaves of `state` are its first moments."""
    owned: dict[str, list[int]] = {}
    places = locate(state, updates)
    for i, (path, _) in enumerate(jax.tree.leaves_with_path(state)):
        place = places.get(keystr(path))  # stored leaves are several
        if place and place.name is not None and place.field(fields):
            owned.setdefault(place.name, []).append(i)
    return owned
