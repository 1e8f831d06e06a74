"""Trees whose `NamedTuple` fields are stored under other names."""

from collections.abc import Mapping
from typing import Any

import jax


def as_stored(tree: Any, names: Mapping[str, str]) -> Any:
    """Returns a tree with a dict, in stored names, for each `NamedTuple`.

    Keys of other nodes, such as names of parameters, stay as they are.

    Args:
      tree: A tree.
      names: Stored names by name of a field.
    """
    return jax.tree.map(
        lambda node: _as_dict(node, names) if _is_named(node) else node,
        tree,
        is_leaf=_is_named,
    )


def from_stored(like: Any, stored: Any, names: Mapping[str, str]) -> Any:
    """Undoes `as_stored`.

    Args:
      like: Tree whose structure to return.
      stored: Tree in stored names.
      names: Stored names by name of a field.
    """

    def read(node: Any, stored: Any) -> Any:
        if not _is_named(node):
            return stored
        parts = (
            from_stored(part, stored[names.get(field, field)], names)
            for field, part in node._asdict().items()
        )
        return type(node)(*parts)

    return jax.tree.map(read, like, stored, is_leaf=_is_named)


def _as_dict(node: Any, names: Mapping[str, str]) -> dict[str, Any]:
    parts = node._asdict().items()
    return {names.get(field, field): as_stored(part, names) for field, part in parts}


def _is_named(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")
