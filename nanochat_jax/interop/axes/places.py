"""Which module a leaf of a tree of modules belongs to."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.tree_util import KeyPath


class Place(NamedTuple):
    """A field of a module.

    Attributes:
      module: The module that the field is part of.
      name: Name of the field.
      parent: What the module is part of, if anything.
      parent_name: Name of the module in its parent.
      value: The field: an array, or a node that holds one array.
    """

    module: Any
    name: str
    parent: Any = None
    parent_name: str = ""
    value: Any = None


class Frame(NamedTuple):
    """A node on the way to a leaf, and the key that is taken in it."""

    node: Any
    key: str


def leaves(tree: Any) -> Iterator[tuple[KeyPath, Any, tuple[Frame, ...]]]:
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
            if is_array(node):
                yield path, node, above
        else:
            frame = Frame(node, jax.tree_util.keystr(keys, simple=True))
            yield from _below(child, (*path, *keys), (*above, frame))


def is_array(x: Any) -> bool:
    """Returns whether something has the shape and type of floating-point numbers."""
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if not isinstance(shape, tuple) or dtype is None:
        return False
    return jax.numpy.issubdtype(dtype, jax.numpy.inexact)


def place(above: tuple[Frame, ...], is_box: Callable[[Any], bool]) -> Place | None:
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
