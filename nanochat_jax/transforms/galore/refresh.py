"""Change of basis: of the leaves that are due, and of their first moments.

Leaves of one shape are renewed in one loop over them, inside one `lax.cond` on a
scalar. A batched predicate would pay for both branches on every step; a branch for each
leaf would have to be compiled for each.
"""

import dataclasses
import functools
import zlib
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.tree_util import keystr
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, UInt32

from nanochat_jax.numerics import hashing
from nanochat_jax.transforms.galore import projection
from nanochat_jax.transforms.galore.basis import Basis, RandomizedSVD
from nanochat_jax.transforms.scheduling import group_by_shape, group_bytes
from nanochat_jax.transforms.sharding import (
    Entries,
    Placement,
    placement as placing,
    vary_over,
    varying_axes,
)
from nanochat_jax.transforms.state_paths import locate


class Coordinates(NamedTuple):
    """A basis, and the first moments in its coordinates.

    Attributes:
      basis: The basis.
      moments: First moments of `inner`.
      complements: First moments of the complement, one for each of `moments`, or none.
    """

    basis: Float[Array, "*batch short r"]
    moments: tuple[Float[Array, "*batch r long"], ...]
    complements: tuple[Float[Array, "*batch m n"], ...]


class Leaf(NamedTuple):
    """A leaf that may be due.

    Attributes:
      gradient: Its gradient.
      due: Whether its basis is to be computed.
      key: Words of its random key: position of its first number, and seed. Of a stack
        there is a key, and a `due`, for each entry.
      now: Its basis and moments so far.
    """

    gradient: Float[Array, "*batch m n"]
    due: Bool[Array, "*entries"]
    key: UInt32[Array, "*entries 2"]
    now: Coordinates


class Where(NamedTuple):
    """Which matrices of the parameters are given, and on which devices.

    Attributes:
      placement: Shardings of the parameters.
      layer: Index on their first axis of the first of the matrices given.
      entries: Entries of stacks, by path, where matrices have owners.
    """

    placement: Placement
    layer: ArrayLike
    entries: Mapping[str, Entries]


def change_bases(
    rule: Basis, reproject: Collection[str], updates: Any, state: Any, where: Where
) -> Any:
    """Returns the state of `galore` with the bases renewed of leaves that are due.

    First moments are moved to the new bases.

    Args:
      rule: When and how a basis is computed.
      reproject: Fields of first moments.
      updates: Gradients.
      state: State of `galore`.
      where: Which matrices are given.
    """
    flat, treedef = jax.tree.flatten_with_path(updates)
    bases = treedef.flatten_up_to(state.basis)
    inner, inner_def = jax.tree.flatten(state.inner)
    complement, complement_def = jax.tree.flatten(state.complement)
    moments = _moments_by_parameter(state.inner, updates, reproject)
    beside = _moments_by_parameter(state.complement, updates, reproject)
    if any(len(moments.get(name, ())) != len(found) for name, found in beside.items()):
        beside = {}  # They do not pair with the inner ones: both are left as they are.
    leaves = {}
    for i, (path, g) in enumerate(flat):
        if bases[i] is not None:
            name = keystr(path)
            now = Coordinates(
                bases[i],
                tuple(inner[j] for j in moments.get(name, ())),
                tuple(complement[j] for j in beside.get(name, ())),
            )
            leaves[i] = _leaf_of(rule, state.count, name, g, now, where)
    shardings = [where.placement.sharding(*leaf) for leaf in flat]
    for group in _alike(leaves, shardings):
        some = [leaves[i] for i in group]
        renewed = (
            [_renew_entries(leaf, rule) for leaf in some]
            if some[0].due.ndim
            else _renew(some, rule, shardings[group[0]])
        )
        for i, new in zip(group, renewed, strict=True):
            name = keystr(flat[i][0])
            bases[i] = new.basis
            _put(inner, moments.get(name, ()), new.moments)
            _put(complement, beside.get(name, ()), new.complements)
    return state._replace(
        basis=treedef.unflatten(bases),
        inner=inner_def.unflatten(inner),
        complement=complement_def.unflatten(complement),
    )


def _leaf_of(
    rule: Basis, count: Array, name: str, g: Array, now: Coordinates, where: Where
) -> Leaf:
    """Returns a leaf that may be due; of a stack, each entry by itself."""
    entries = where.entries.get(name)
    sketch = (*g.shape[:-2], now.basis.shape[-1], now.basis.shape[-2])
    if entries is None:
        due = _is_due(rule, count, name, g, now.basis)
        key = [hashing.start_of(where.layer, sketch), _seed_of(rule, count, name)]
        return Leaf(g, due, jnp.stack(key), now)
    member, place = entries.members(where.layer, len(g))
    names = entries.stack.members
    word = lambda name: _word_of(rule, name)
    seeds = _seeded(entries.words(word, member), count)
    starts = jax.vmap(lambda i: hashing.start_of(i, sketch))(place)
    key = jnp.stack([starts, seeds], axis=-1)

    def is_due(entry: tuple[Array, Array, Array]) -> Array:
        member, g, basis = entry
        each = [functools.partial(_is_due, rule, count, name) for name in names]
        return jax.lax.switch(member, each, g, basis)

    if type(rule).is_due is RandomizedSVD.is_due:  # which is one for all
        one = _is_due(rule, count, names[0], g, now.basis)
        return Leaf(g, jnp.broadcast_to(one, len(g)), key, now)
    return Leaf(g, jax.lax.map(is_due, (member, g, now.basis)), key, now)


def _is_due(rule: Basis, count: Array, name: str, g: Array, basis: Array) -> Array:
    is_due = rule.is_due(count, name, projection.short_first(g), basis)
    if jnp.shape(is_due) != ():
        raise ValueError(
            f"`is_due` of {rule} must return one truth value for {name}, got "
            f"an array of shape {jnp.shape(is_due)}."
        )
    return (count == 0) | is_due


def _put(items: list[Array], places: Sequence[int], new: Sequence[Array]) -> None:
    for i, x in zip(places, new, strict=True):
        items[i] = x


def _seed_of(rule: Basis, count: Array, name: str) -> UInt32[Array, ""]:
    return _seeded(jnp.uint32(_word_of(rule, name)), count)


def _word_of(rule: Basis, name: str) -> int:
    return zlib.crc32(f"{getattr(rule, 'seed', 0)} galore{name}".encode())


def _seeded(word: Array, count: Array) -> Array:
    return hashing.mix_bits(word ^ hashing.mix_bits(count.astype(jnp.uint32)))


def _alike(
    leaves: Mapping[int, Leaf], shardings: Sequence[Hashable]
) -> list[list[int]]:
    """Groups leaves whose gradients and bases have one shape and one sharding."""
    ids = list(leaves)
    groups = group_by_shape(
        [leaves[i].gradient for i in ids],
        group_bytes(),
        kinds=[
            (leaves[i].now.basis.shape, leaves[i].due.ndim, shardings[i]) for i in ids
        ],
    )
    return [[ids[k] for k in group] for group in groups]


def _moments_by_parameter(
    state: optax.OptState, updates: Any, fields: Collection[str]
) -> dict[str, list[int]]:
    """Returns, by parameter path, which leaves of `state` are its first moments."""
    owned: dict[str, list[int]] = {}
    places = locate(state, updates)
    for i, (path, _) in enumerate(jax.tree.leaves_with_path(state)):
        place = places.get(keystr(path))  # a quantised leaf has two paths of its own
        if place and place.name is not None and place.field(fields):
            owned.setdefault(place.name, []).append(i)
    return owned


def _renew(
    leaves: Sequence[Leaf], rule: Basis, sharding: NamedSharding | None
) -> list[Coordinates]:
    """Returns bases and moments of leaves of one shape, renewed where they are due."""
    # All as one of them, since branches must agree in that too.
    leaves = vary_over(list(leaves), varying_axes(leaves))
    if placing.is_split(sharding) and isinstance(rule, RandomizedSVD):
        # Nothing larger than a basis is to be sent between devices.
        rule = dataclasses.replace(rule, form_gram=False)
    if_due = functools.partial(_renew_if_due, rule=rule, sharding=sharding)
    if len(leaves) == 1:
        return [if_due(leaves[0])]

    def renew_due() -> list[Coordinates]:
        # Picked one by one, as a stack of them would be a copy of all.
        pick = lambda i: jax.lax.switch(i, [lambda x=x: x for x in leaves])
        turns = jnp.arange(len(leaves), dtype=jnp.int32)
        renewed = jax.lax.map(lambda i: if_due(pick(i)), turns)
        return [jax.tree.map(lambda x, i=i: x[i], renewed) for i in range(len(leaves))]

    any_due = jnp.stack([leaf.due for leaf in leaves]).any()
    return jax.lax.cond(any_due, renew_due, lambda: [leaf.now for leaf in leaves])


def _renew_entries(stack: Leaf, rule: Basis) -> Coordinates:
    """Returns bases and moments of entries of a stack, renewed where they are due.

    One by one, as separate leaves are: sums are then in the same order, and bits the
    same.
    """
    one = functools.partial(_renew_if_due, rule=rule, sharding=None)
    renew = lambda: jax.lax.map(one, stack)
    return jax.lax.cond(stack.due.any(), renew, lambda: stack.now)


def _renew_if_due(
    leaf: Leaf, rule: Basis, sharding: NamedSharding | None
) -> Coordinates:
    find = lambda: _in_new_basis(leaf, rule, sharding)
    return jax.lax.cond(leaf.due, find, lambda: leaf.now)


def _in_new_basis(
    leaf: Leaf, rule: Basis, sharding: NamedSharding | None
) -> Coordinates:
    g, now = leaf.gradient, leaf.now
    usable = jnp.isfinite(g).all((-2, -1), keepdims=True)
    usable &= (g != 0).any((-2, -1), keepdims=True)
    x = jnp.where(usable, g, 0).astype(jnp.float32)
    wholes = _whole_moments(leaf)
    new = rule.find(
        projection.short_first(placing.split_long(x, sharding)),
        now.basis,
        projection.short_first(wholes[0]) if wholes else None,
        jax.random.wrap_key_data(leaf.key, impl="threefry2x32"),
    ).astype(now.basis.dtype)
    if new.shape != now.basis.shape:
        raise ValueError(
            f"`find` of {rule} must return a basis of shape {now.basis.shape}, got "
            f"{new.shape}."
        )
    new = jnp.where(usable, new, now.basis)
    if now.complements:
        moved = [projection.project(m, new) for m in wholes]
    else:
        rotation = projection.matmul(new.mT, now.basis)
        moved = [projection.matmul(rotation, m) for m in now.moments]
    complements = [
        projection.cut_off(m, low, new).astype(old.dtype)
        for m, low, old in zip(wholes, moved, now.complements, strict=False)
    ]
    moved = [x.astype(m.dtype) for x, m in zip(moved, now.moments, strict=True)]
    return Coordinates(new, tuple(moved), tuple(complements))


def _whole_moments(leaf: Leaf) -> list[Array]:
    """Returns first moments in the coordinates of the gradient: `P·m + complement`."""
    moments = leaf.now.moments
    complements = leaf.now.complements or [0.0] * len(moments)
    lift = lambda m: projection.lift(m, leaf.now.basis, leaf.gradient.shape)
    return [lift(m) + rest for m, rest in zip(moments, complements, strict=True)]
