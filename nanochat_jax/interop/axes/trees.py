"""Axes of the leaves of pytrees that are, or hold, modules."""

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath

from nanochat_jax.interop.axes import equinox, haliax, nnx
from nanochat_jax.interop.axes.declared import Declared, Place, vector
from nanochat_jax.interop.axes.requests import Requests
from nanochat_jax.interop.axes.settle import Found, settle


class Frame(NamedTuple):
    """A node on the way to a leaf, and the key that is taken in it."""

    node: Any
    key: str


def holds_modules(tree: Any) -> bool:
    """Returns whether a pytree is or holds a module of a known framework.

    It looks at the types of nodes only.

    Args:
      tree: Any pytree.
    """
    kinds = _kinds()
    if not kinds:
        return False
    nodes = [jax.tree.structure(tree)]
    while nodes:
        node = nodes.pop()
        data = node.node_data()
        if data is not None and issubclass(data[0], kinds):
            return True
        nodes.extend(node.children())
    return False


def matrix_axes(tree: Any, requests: Requests, *, strict: bool = True) -> Any:
    """Returns axes for each leaf of a pytree of modules.

    Args:
      tree: Modules, whole or filtered, of arrays or of their shapes.
      requests: Parts that are to be a batch.
      strict: Whether leaves of two readings are an error.

    Returns:
      The same tree with answers for leaves, `None` for leaves that are not floating
      point.

    Raises:
      ValueError: If leaves have two readings, or a request meets no leaf.
    """
    found: dict[KeyPath, Found] = {}
    for path, leaf, above in _leaves(tree):
        declared = _declare(above)
        if declared is not None:
            found[path] = Found(declared, tuple(leaf.shape))
    answers = settle(found, requests, strict=strict)
    return jax.tree.map_with_path(lambda path, _: answers.get(path), tree)


def _declare(above: tuple[Frame, ...]) -> Declared | None:
    place = _place(above, _is_box)
    if place is None:
        return None
    frameworks = [f for name, f in _FRAMEWORKS.items() if name in sys.modules]
    for framework in frameworks:
        declared = framework.declare(place)
        if declared is not None:
            return declared
    for frame in reversed(above):  # a leaf deep in a norm, such as a running mean
        if isinstance(frame.node, _kinds()) and not _is_box(frame.node):
            deep = any(framework.is_vector(frame.node) for framework in frameworks)
            return vector() if deep else None
    return None


def _is_box(node: Any) -> bool:
    """Returns whether a node is one that holds the array of a field."""
    if "flax.nnx" in sys.modules and isinstance(node, sys.modules["flax.nnx"].Variable):
        return True
    return "haliax" in sys.modules and haliax.is_named(node)


def _kinds() -> tuple[type, ...]:
    """Returns the classes of modules of the frameworks that are imported."""
    names = [("equinox", "Module"), ("flax.nnx", "Module"), ("haliax", "NamedArray")]
    found = (getattr(sys.modules.get(name), kind, None) for name, kind in names)
    return tuple(kind for kind in found if kind is not None)


def _leaves(tree: Any) -> Iterator[tuple[KeyPath, Any, tuple[Frame, ...]]]:
    """Yields path, leaf and the nodes above it for each leaf that is an array.

    Args:
      tree: Any pytree.
    """
    yield from _below(tree, (), ())


def _below(
    node: Any, path: KeyPath, above: tuple[Frame, ...]
) -> Iterator[tuple[KeyPath, Any, tuple[Frame, ...]]]:
    children, _ = jax.tree.flatten_with_path(node, is_leaf=lambda x: x is not node)
    for keys, child in children:
        if child is node:
            if _is_array(node):
                yield path, node, above
        else:
            frame = Frame(node, jax.tree_util.keystr(keys, simple=True))
            yield from _below(child, (*path, *keys), (*above, frame))


def _is_array(x: Any) -> bool:
    """Returns whether something has the shape and type of floating-point numbers."""
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if not isinstance(shape, tuple) or dtype is None:
        return False
    return jnp.issubdtype(dtype, jnp.inexact)


def _place(above: tuple[Frame, ...], is_box: Callable[[Any], bool]) -> Place | None:
    """Returns the field that a leaf is, or `None` if it is at the top.

    Args:
      above: The nodes above the leaf.
      is_box: Whether a node only wraps the array that is the field.
    """
    value = None
    if above and is_box(above[-1].node):
        value, above = above[-1].node, above[:-1]
    if not above:
        return None
    module, name = above[-1]
    parent, parent_name = above[-2] if len(above) > 1 else (None, "")
    return Place(module, name, parent, parent_name, value)


_FRAMEWORKS: dict[str, Any] = {"haliax": haliax, "equinox": equinox, "flax.nnx": nnx}
