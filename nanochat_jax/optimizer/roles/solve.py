"""Finds all ways in which leaves that belong together can be read."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from nanochat_jax.optimizer.roles.leaves import Leaf, Shape
from nanochat_jax.optimizer.roles.stacks import Stack
from nanochat_jax.transforms import MatrixAxes

# Axes of stacks, taken away one after the other; `(0, 0)` are the first two.
_BATCHES = ((), (0,), (1,), (-1,), (0, 0), (-1, 0))


class Way(NamedTuple):
    """One way to read leaves.

    Attributes:
      batch: Axes of the stacks they are in, one after the other.
      views: Axes of the matrices, by path.
      what: Description of the leaves in this reading.
      sure: Whether that tells input from output, whatever the leaves are called.
    """

    batch: tuple[int, ...]
    views: dict[Any, MatrixAxes]
    what: str
    sure: bool = True


class Rest(NamedTuple):
    """The axes of a leaf outside its stacks.

    Attributes:
      shape: Sizes of the axes that are left.
      axes: Where these are in the leaf, counted from the end.
      stacked: Sizes of the stacks.
    """

    shape: Shape
    axes: tuple[int, ...]
    stacked: Shape

    def view(self, fan_in: Iterable[int], fan_out: Iterable[int]) -> MatrixAxes:
        """Returns axes of the leaf, from positions in `shape`."""
        at = lambda axes: tuple(self.axes[axis] for axis in axes)
        return MatrixAxes(at(fan_in), at(fan_out))


def batches(stack: Stack) -> Sequence[tuple[int, ...]]:
    """Returns the stacks that leaves may be in, where that much is known of them."""
    return [(axis, *more) for axis in stack.places for more in ((), (0,))] or _BATCHES


def without(shape: Shape, batch: tuple[int, ...]) -> Rest | None:
    """Returns a shape without the axes of its stacks, or nothing if it lacks them."""
    kept = list(range(-len(shape), 0))
    stacked: list[int] = []
    for axis in batch:
        if not -len(kept) <= axis < len(kept):
            return None
        stacked.append(shape[kept.pop(axis)])
    return Rest(tuple(shape[axis] for axis in kept), tuple(kept), tuple(stacked))


def unify(members: Sequence[tuple[Leaf, str]], batch: tuple[int, ...]) -> Any:
    """Reads leaves by their layouts, if the sizes agree.

    Args:
      members: Leaves and their layouts, such as `"DHK D->HK"`: a letter for every axis,
        then the letters of input and output; letters alone for a vector. A digit is a
        size.
      batch: Stacks to take away first.

    Returns:
      The axes of each matrix by its path, or `None` if sizes do not agree.
    """
    sizes: dict[str, int] = {str(digit): digit for digit in range(10)}
    views = {}
    stacks = set()
    for leaf, layout in members:
        rest = without(leaf.shape, batch)
        letters, _, maps = layout.partition(" ")
        if rest is None or len(rest.shape) != len(letters):
            return None
        stacks.add(rest.stacked)
        if any(
            sizes.setdefault(x, n) != n
            for x, n in zip(letters, rest.shape, strict=True)
        ):
            return None
        if maps:
            sides = ([*map(letters.index, side)] for side in maps.split("->"))
            views[leaf.path] = rest.view(*sides)
    return views if len(stacks) == 1 else None


def different(ways: Sequence[Way], leaf: Leaf) -> list[Way]:
    """Returns ways that differ in how they see one leaf."""
    seen: dict[Any, Way] = {}
    for way in ways:
        seen.setdefault(_sides(way.views[leaf.path], leaf.shape), way)
    return [*seen.values()]


def settled(ways: Sequence[Way], leaf: Leaf, stack: Stack) -> list[Way]:
    """Returns the ways that evidence on stacks leaves open.

    That a block is not stacked, or not once more, decides only between several ways: a
    part of it may be stacked by itself.
    """
    left = different(ways, leaf)
    if len(left) > 1 and stack.whole:
        depth = 1 if stack.places else 0
        return [way for way in left if len(way.batch) == depth] or left
    return left


def _sides(axes: MatrixAxes, shape: Shape) -> Any:
    """Returns the axes of input and output that hold more than one entry."""
    found = axes.resolve(shape)
    sides = (found.fan_in, found.fan_out)
    return tuple(tuple(i for i in side if shape[i] != 1) for side in sides)
