"""Compares what the library settled for a tree with what the tree should have."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a leaf should be: a label, and axes if it is a matrix."""

    shape: tuple[int, ...]
    label: str
    fan_in: tuple[int, ...] = ()
    fan_out: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Expected":
        """Reads `"768x12x64 matrix 0->12"` or `"768 vector"`."""
        sizes, label, *axes = text.split()
        shape = tuple(int(size) for size in sizes.split("x")) if sizes != "-" else ()
        if not axes:
            return cls(shape, label)
        fan_in, fan_out = (tuple(map(int, side)) for side in axes[0].split("->"))
        return cls(shape, label, fan_in, fan_out)

    @property
    def batch(self) -> tuple[int, ...]:
        """Axes that are neither summed over nor made."""
        taken = {*self.fan_in, *self.fan_out}
        return tuple(axis for axis in range(len(self.shape)) if axis not in taken)

    @property
    def order(self) -> tuple[int, ...]:
        """Axes in the order of the view."""
        return (*self.batch, *self.fan_in, *self.fan_out)

    @property
    def view_shape(self) -> tuple[int, int, int]:
        """Shape `[batch, fan_in, fan_out]` of the view."""
        size = lambda axes: math.prod(self.shape[axis] for axis in axes)
        return size(self.batch), size(self.fan_in), size(self.fan_out)

    def view(self, x: np.ndarray) -> np.ndarray:
        """Returns a leaf as `[batch, fan_in, fan_out]`."""
        return np.transpose(x, self.order).reshape(self.view_shape)

    def unview(self, x: np.ndarray) -> np.ndarray:
        """Returns a leaf in its own shape; undoes `view`."""
        x = x.reshape([self.shape[axis] for axis in self.order])
        return np.transpose(x, np.argsort(self.order))


def slashed(path: Any) -> str:
    """Returns a path with slashes, without the attribute that holds a Flax array."""
    name = keystr(path, simple=True, separator="/")
    return name.removesuffix("/value") if name.count("/") else name


def leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path."""
    return {slashed(path): x for path, x in jax.tree.leaves_with_path(tree)}


def bare(tree: Any) -> Any:
    """Returns the leaves in nested dicts with the same keys, or in a list as it is."""
    if isinstance(tree, list):
        return list(tree)
    result: dict = {}
    for path, x in jax.tree.leaves_with_path(tree):
        *folders, last = [keystr((key,), simple=True) for key in path]
        if last == "value" and folders:
            *folders, last = folders
        place = result
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = x
    return result


def verdict(role: Any, expected: Expected) -> str:
    """Returns `"right"`, `"refused"`, or what is wrong with a role.

    Axes of size 1 count for nothing. An embedding, a head and a vector are all for
    AdamW, so one in place of the other is right, but for its weight decay.
    """
    if role.label == "matrix" and role.axes is None:
        return "refused"
    if "matrix" not in (role.label, expected.label):
        return "right" if role.label == expected.label else "right, other label"
    if role.label != expected.label:
        return f"wrong: {role.label}"
    return "right" if _same_axes(role.axes, expected) else f"wrong: {role.axes}"


def _same_axes(axes: Any, expected: Expected) -> bool:
    shape = expected.shape
    sides = lambda side: {axis % len(shape) for axis in side}
    thick = lambda side: {axis for axis in side if shape[axis] > 1}
    found = axes.resolve(shape)
    if found.split:
        return False
    pairs = (found.fan_in, expected.fan_in), (found.fan_out, expected.fan_out)
    return all(thick(sides(have)) == thick(sides(want)) for have, want in pairs)
