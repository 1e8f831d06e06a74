"""Axes of the leaves of pytrees that are, or hold, modules."""

import sys
from typing import Any

import jax
from jax.tree_util import KeyPath

from nanochat_jax.interop.axes import equinox, haliax, nnx, places
from nanochat_jax.interop.axes.declared import Declared, vector
from nanochat_jax.interop.axes.requests import Requests
from nanochat_jax.interop.axes.settle import Found, settle


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
      requests: What is asked for as a batch.
      strict: Whether leaves of two readings are an error.

    Returns:
      The same tree with answers for leaves, `None` for what is no floating-point array.

    Raises:
      ValueError: If leaves have two readings, or a request meets no leaf.
    """
    found: dict[KeyPath, Found] = {}
    for path, leaf, above in places.leaves(tree):
        declared = _declare(above)
        if declared is not None:
            found[path] = Found(declared, tuple(leaf.shape))
    answers = settle(found, requests, strict=strict)
    return jax.tree.map_with_path(lambda path, _: answers.get(path), tree)


def _declare(above: tuple[places.Frame, ...]) -> Declared | None:
    place = places.place(above, _is_box)
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


_FRAMEWORKS: dict[str, Any] = {"haliax": haliax, "equinox": equinox, "flax.nnx": nnx}
