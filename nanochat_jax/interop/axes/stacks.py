"""Where stacked leaves have more axes than their class declares.

A module under `vmap` or `scan` has leaves with further axes; its own attributes tell
their shape without. Where the sizes leave two readings, such as 12 layers of 12 heads,
the other leaves of the same stack decide: all of them are stacked along one axis.
"""

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

Path = tuple[Hashable, ...]
Reading = tuple[int, ...]
"""For each declared axis, where it is in the leaf."""


class Leaf(NamedTuple):
    """Shape of a leaf beside the shape that its class declares.

    Attributes:
      declared: Shape that the class declares, `None` for sizes that it does not store.
      shape: Shape of the leaf.
    """

    declared: tuple[int | None, ...]
    shape: tuple[int, ...]


def read(leaves: Mapping[Path, Leaf], path: Path) -> list[Reading]:
    """Returns the readings of a leaf: none, one or several.

    Args:
      leaves: All leaves of which shapes are declared.
      path: Path of the leaf.
    """
    leaf = leaves[path]
    found = _different(readings(leaf), leaf.shape)
    for depth in range(len(path) - 1, -1, -1):
        if len(found) < 2:
            return found
        below = [other for at, other in leaves.items() if at[:depth] == path[:depth]]
        sizes = [_sizes(reading, leaf.shape) for reading in found]
        rules = _common_rules(below, sizes)
        if rules is None:  # the stack ends below this depth
            return found
        fits = [r for r in found if _rules(r, len(leaf.shape)) & rules]
        found = fits or found
    return found


def readings(leaf: Leaf) -> list[Reading]:
    """Returns all places where the declared axes can be in a leaf, in their order."""
    return [
        places
        for places in itertools.combinations(range(len(leaf.shape)), len(leaf.declared))
        if all(
            size is None or leaf.shape[place] == size
            for place, size in zip(places, leaf.declared, strict=True)
        )
    ]


def _common_rules(
    leaves: Iterable[Leaf], sizes: Sequence[tuple[int, ...]]
) -> set[Reading] | None:
    """Returns the stacked axes that fit all leaves, or `None` if one is not stacked.

    Args:
      leaves: The leaves.
      sizes: Sizes of the stack.
    """
    common: set[Reading] | None = None
    stacked = len(sizes[0])
    for leaf in leaves:
        found = readings(leaf)
        if not found or len(leaf.shape) - len(leaf.declared) > stacked:
            continue  # a stack within the stack tells nothing of the outer one
        fits = [r for r in found if _sizes(r, leaf.shape) in sizes]
        if not fits:
            return None
        rules = set().union(*(_rules(reading, len(leaf.shape)) for reading in fits))
        common = rules if common is None else common & rules
    return common or None


def _rules(reading: Reading, ndim: int) -> set[Reading]:
    """Returns the axes of the stack, each counted from the front and from the end."""
    stacked = [axis for axis in range(ndim) if axis not in reading]
    return set(itertools.product(*((axis, axis - ndim) for axis in stacked)))


def _sizes(reading: Reading, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for axis, n in enumerate(shape) if axis not in reading)


def _different(found: list[Reading], shape: tuple[int, ...]) -> list[Reading]:
    """Returns readings that differ by more than axes of one entry."""
    unlike = {}
    for reading in found:
        stacked = [axis for axis in range(len(shape)) if axis not in reading]
        seen = [(axis, -1) for axis in stacked]
        seen += [(axis, i) for i, axis in enumerate(reading)]
        unlike.setdefault(tuple(at for at in seen if shape[at[0]] > 1), reading)
    return list(unlike.values())
