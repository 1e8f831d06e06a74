"""States of `owned` laid out for another number of devices, and leaf by leaf.

A layout is the stacks of each `OwnedState` of a state, by its path. Arrays may be JAX's
or NumPy's, or shapes.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import KeyPath, keystr

from nanochat_jax.codecs import is_quantized
from nanochat_jax.transforms.owners import trees
from nanochat_jax.transforms.sharding import OwnedState, Stack, is_owned

Layout = Mapping[str, OwnedState]
"""Nodes of a state by path, without their arrays."""


def restacked(state: optax.OptState, like: Any) -> optax.OptState:
    """Returns a state laid out as another one: the same numbers in other places.

    On several devices `owned` keeps the state of all matrices of one shape in one
    stack, whose size depends on the number of devices; on one it keeps the state of
    each leaf by itself. Zeros fill up a stack.

    Example:
      >>> from nanochat_jax.transforms import owned
      >>> tx = owned(galore(momentum(), 8))
      >>> params = {"kernel": jnp.ones((32, 64))}
      >>> state = restacked(tx.init(params), jax.eval_shape(tx.init, params))

    Args:
      state: A state, of the same transform with the same storage.
      like: State whose layout to take: arrays, or shapes with shardings or without.

    Returns:
      The state with the structure of `like`, and its shardings if it has some; arrays
      of NumPy stay on the host.

    Raises:
      ValueError: If the state has not the paths, shapes and types of `like`.
    """
    found = _apart(state)
    missing: list[str] = []

    def get(name: str) -> Any:
        if name not in found:
            missing.append(f"  {name}")
        return found.get(name)

    def take(path: KeyPath, node: Any) -> Any:
        name = keystr(path)
        if not is_owned(node):
            return get(name)
        return _filled(node, lambda inside: get(name + inside))

    new = jax.tree.map_with_path(take, like, is_leaf=_is_node)
    facts = lambda tree: [
        (keystr(path), x.shape, str(x.dtype))
        for path, x in jax.tree.leaves_with_path(tree)
    ]
    wrong = [] if missing else {*facts(like)} ^ {*facts(new)}
    if missing or wrong:
        wrong = sorted(f"  {name} {kind}{shape}" for name, shape, kind in wrong)
        raise ValueError(
            "the state is not one of that transform, or not in that storage. Missing, "
            "or not the same:\n" + "\n".join(missing or wrong)
        )
    return jax.tree.map(_placed, new, like)


def layout_of(state: Any) -> dict[str, OwnedState]:
    """Returns the layout of a state: its `OwnedState` nodes by path, without arrays."""
    flat = jax.tree.leaves_with_path(state, is_leaf=is_owned)
    return {
        keystr(path): OwnedState(None, None, node.stacks, node.alone)
        for path, node in flat
        if is_owned(node)
    }


def with_layout(state: Any, layout: Layout) -> Any:
    """Returns a state, or its shapes, in another layout.

    Args:
      state: The state, in any layout.
      layout: The layout; without a node in its place, one is left out.
    """
    found = _apart(state)
    plain = jax.tree.map_with_path(
        lambda path, node: _leaf_by_leaf(keystr(path), node, found),
        state,
        is_leaf=_is_node,
    )

    def visit(path: KeyPath, node: Any) -> Any:
        wanted = layout.get(keystr(path))
        return node if wanted is None else _stacked(node, wanted)

    is_place = lambda path, node: keystr(path) in layout or is_quantized(node)
    return jax.tree_util.tree_map_with_path(
        visit, plain, is_leaf=is_place, is_leaf_takes_path=True
    )


def as_json(layout: Layout) -> dict[str, Any]:
    """Returns a layout as JSON values."""
    return {
        path: {
            "stacks": [[list(x.members), list(x.batch), x.size] for x in node.stacks],
            "alone": list(node.alone),
        }
        for path, node in layout.items()
    }


def from_json(record: Mapping[str, Any]) -> dict[str, OwnedState]:
    """Undoes `as_json`."""
    stack = lambda members, batch, size: Stack(tuple(members), tuple(batch), size)
    return {
        path: OwnedState(
            None, None, tuple(stack(*x) for x in node["stacks"]), tuple(node["alone"])
        )
        for path, node in record.items()
    }


def _apart(state: Any) -> dict[str, Any]:
    """Returns the nodes of a state by the paths they have leaf by leaf."""
    found: dict[str, Any] = {}
    for path, node in jax.tree.leaves_with_path(state, is_leaf=_is_node):
        if is_owned(node):
            inside = _nodes(node.rest) | dict(_members(node))
            found |= {keystr(path) + name: x for name, x in inside.items()}
        else:
            found[keystr(path)] = node
    return found


def _members(node: OwnedState) -> Iterator[tuple[str, Any]]:
    """Yields the nodes of the state of stacks, by the paths they have leaf by leaf."""
    nodes = _nodes(node.inner)
    for name, x in nodes.items():
        above, stack = _stack_at(name, node.stacks, nodes)
        if stack is None and not trees.is_absent(x):
            yield name, x
        elif stack is not None:
            parts = (above + member for member in stack.members)
            yield from zip(parts, _split(x, stack), strict=True)


def _filled(node: OwnedState, get: Callable[[str], Any]) -> OwnedState:
    """Returns a node with the arrays that `get` has for paths leaf by leaf."""
    nodes = _nodes(node.inner)

    def take(path: KeyPath, x: Any) -> Any:
        if trees.is_absent(x):
            return x
        above, stack = _stack_at(keystr(path), node.stacks, nodes)
        if stack is None:
            return get(keystr(path))
        return _together([get(above + name) for name in stack.members], stack)

    inner = jax.tree.map_with_path(take, node.inner, is_leaf=_is_entry)
    rest = jax.tree.map_with_path(
        lambda path, x: x if trees.is_absent(x) else get(keystr(path)),
        node.rest,
        is_leaf=_is_entry,
    )
    return OwnedState(inner, rest, node.stacks, node.alone)


def _leaf_by_leaf(name: str, node: Any, found: Mapping[str, Any]) -> Any:
    if not is_owned(node):
        return node
    return jax.tree.map_with_path(
        lambda path, x: found.get(name + keystr(path), x), node.inner, is_leaf=_is_entry
    )


def _stacked(node: Any, wanted: OwnedState) -> OwnedState:
    """Returns the part of a state that is kept leaf by leaf, in a layout."""
    nodes, members = _nodes(node), trees.members_of(wanted.stacks)
    absent = optax.MaskedNode()

    def of_stacks(path: KeyPath, x: Any) -> Any:
        above, stack = _stack_at(keystr(path), wanted.stacks, nodes)
        if stack is not None:
            return _together([nodes[above + name] for name in stack.members], stack)
        others = {*members, *wanted.alone}
        return absent if _owner(keystr(path), others) else x

    def of_rest(path: KeyPath, x: Any) -> Any:
        return absent if _owner(keystr(path), members) else x

    inner, rest = (
        jax.tree.map_with_path(visit, node, is_leaf=_is_entry)
        for visit in (of_stacks, of_rest)
    )
    return OwnedState(
        inner, rest if wanted.alone else None, wanted.stacks, wanted.alone
    )


def _stack_at(
    name: str, stacks: Collection[Stack], nodes: Mapping[str, Any]
) -> tuple[str, Stack | None]:
    """Returns the stack whose first member a path ends in, and the path above it.

    Names may end in one another: all members must be there, and the longest counts.
    """
    fitting = [
        (name.removesuffix(stack.members[0]), stack)
        for stack in stacks
        if name.endswith(stack.members[0])
    ]
    whole = [
        (len(above), above, stack)
        for above, stack in fitting
        if all(above + member in nodes for member in stack.members)
    ]
    if not whole:
        return "", None
    _, above, stack = min(whole, key=lambda found: found[0])
    return above, stack


def _owner(name: str, members: Collection[str]) -> str | None:
    return next((member for member in members if name.endswith(member)), None)


def _nodes(tree: Any) -> dict[str, Any]:
    """Returns the nodes of a state by path, absent ones too."""
    flat = jax.tree.leaves_with_path(tree, is_leaf=_is_entry)
    return {keystr(path): x for path, x in flat}


def _is_node(node: Any) -> bool:
    return is_owned(node) or is_quantized(node)


def _is_entry(node: Any) -> bool:
    return is_quantized(node) or trees.is_absent(node)


def _split(node: Any, stack: Stack) -> list[Any]:
    """Returns the members of a stacked node."""

    def part(x: Any, i: int) -> Any:
        shape = (*stack.batch, *x.shape[1:])
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(shape, x.dtype)
        return x[i * stack.each : (i + 1) * stack.each].reshape(shape)

    count = range(len(stack.members))
    return [jax.tree.map(lambda x, i=i: part(x, i), node) for i in count]


def _together(nodes: list[Any], stack: Stack) -> Any:
    """Undoes `_split`."""

    def whole(*parts: Any) -> Any:
        x, *_ = parts
        rest = x.shape[len(stack.batch) :]
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((stack.size, *rest), x.dtype)
        on_host = all(isinstance(x, np.ndarray) for x in parts)
        xp: Any = np if on_host else jnp
        fill = xp.zeros((stack.size - stack.matrices, *rest), x.dtype)
        return xp.concatenate([*(x.reshape(-1, *rest) for x in parts), fill])

    if any(x is None or trees.is_absent(x) for x in nodes):
        return nodes[0]
    return jax.tree.map(whole, *nodes)


def _placed(x: Any, like: Any) -> Any:
    sharding = getattr(like, "sharding", None)
    if sharding is None or not isinstance(x, jax.Array):
        return x
    return jax.device_put(x, sharding)
