"""The group of each parameter, by patterns on paths."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nanochat_jax.config import Group
from nanochat_jax.optimizer.groups.paths import (
    layer_paths,
    nearest_paths,
    slashed_paths,
    with_parents,
)

Paths = Mapping[str, tuple[str, tuple[int, ...]]]


def groups_of(groups: Sequence[Group], params: Any) -> dict[str, Group]:
    """Returns the group of each parameter that is in one.

    Example:
      >>> params = {"embed": {"embedding": jnp.ones((8, 4))}, "out": jnp.ones(4)}
      >>> [*groups_of([Group("embed", lr=0.2)], params)]
      ["['embed']['embedding']"]

    Args:
      groups: The groups. The first one that matches a parameter has it.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      Groups by path of the parameter as `jax.tree_util.keystr` gives it.

    Raises:
      ValueError: If a group that is not optional has no parameter, or one is for single
        layers of stacked blocks; with all of them.
    """
    paths = slashed_paths(params)
    found: dict[str, Group] = {}
    errors = []
    for group in groups:
        mine = [name for name, (path, _) in paths.items() if _matches(group, path)]
        told = [*_single_layers(group, paths, mine)]
        empty = not {*mine} - found.keys()
        if empty and not group.optional and not told:
            told.append(_why_empty(group, paths, [found[name] for name in mine]))
        errors += told
        found = dict.fromkeys(mine, group) | found
    if errors:
        raise ValueError("\n".join(errors))
    return found


def _matches(group: Group, path: str) -> bool:
    return any(re.fullmatch(group.match, part) for part in with_parents(path))


def _single_layers(group: Group, paths: Paths, mine: Sequence[str]) -> Iterator[str]:
    """Yields an error if a group is for some layers of an array of stacked ones."""
    # Patterns that match something and name no number are not for layers.
    if mine and not re.search(r"\d|\\d", group.match):
        return
    for name, (path, shape) in paths.items():
        for layer in () if name in mine else layer_paths(path, shape):
            if _matches(group, layer):
                yield (
                    f"the group {group.match!r} is for layers by their number, such as "
                    f"{layer}, but these are stacked in one array, {path} "
                    f"{list(shape)}. Match that one, or set `scan_layers` and "
                    "`update_in_backward` to false."
                )
                return


def _why_empty(group: Group, paths: Paths, taken: Sequence[Group]) -> str:
    """Returns why a group has no parameter, and what to give instead."""
    if taken:
        before = ", ".join(sorted({repr(other.match) for other in taken}))
        return (
            f"the group {group.match!r} has no parameter: all that it matches are in "
            f"groups before it, {before}. Put it before these, or leave it out."
        )
    near = nearest_paths(group.match, [path for path, _ in paths.values()])
    return (
        f"the group {group.match!r} matches no parameter. It must match a whole path, "
        f"such as {', '.join(near)}; or set `optional = true` in it."
    )
