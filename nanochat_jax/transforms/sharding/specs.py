"""Which mesh axes shard an array that stems from a parameter, such as its momentum."""

import math
from collections.abc import Sequence

from jax.sharding import NamedSharding, PartitionSpec

from nanochat_jax.transforms.axes import ResolvedAxes

Axes = tuple[tuple[str, ...], ...]
"""Names of mesh axes, for each dimension of an array those that shard it."""


def axes_of(sharding: NamedSharding, ndim: int) -> Axes:
    """Returns the mesh axes that shard each dimension, major first."""
    entries = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    axes = [(e,) if isinstance(e, str) else e for e in entries]
    return tuple(e if isinstance(e, tuple) else () for e in axes)


def ways(sharding: NamedSharding, axes: Sequence[str]) -> int:
    """Returns over how many devices `axes` spread an array."""
    return math.prod(sharding.mesh.shape[axis] for axis in axes)


def derived(
    shape: tuple[int, ...], like: tuple[int, ...], sharding: NamedSharding
) -> NamedSharding:
    """Returns how to shard an array that stems from a parameter.

    A dimension survives if it has the size of the parameter's in its place, or, where a
    matrix was transposed, of another; it keeps its mesh axes. Those of the dimensions
    that do not survive go to the first dimension that they divide. So what has the
    parameter's shape is sharded as it, and a low-rank momentum `[r, long]` or a basis
    `[short, r]` is spread over as many devices as the parameter if any size allows.

    Args:
      shape: Shape of the array; with another number of axes it is replicated.
      like: Shape of the parameter.
      sharding: Sharding of the parameter.
    """
    if len(shape) != len(like):
        return replicated(sharding)
    axes, left = axes_of(sharding, len(like)), list(range(len(like)))
    chosen: dict[int, tuple[str, ...]] = {}
    for place in (True, False):
        for d, size in enumerate(shape):
            same = [j for j in left if like[j] == size and (j == d or not place)]
            if d not in chosen and same:
                left.remove(same[0])
                chosen[d] = axes[same[0]]
    kept = tuple(chosen.get(d, ()) for d in range(len(shape)))
    return fit(shape, sharding, kept, [axis for j in left for axis in axes[j]])


def viewed(view: ResolvedAxes, sharding: NamedSharding) -> NamedSharding:
    """Returns how to shard a leaf that is seen as matrices.

    A merged axis is sharded as the first of its parts, and axes of the batch as they
    are. Mesh axes that have no place so go to the first dimension that they divide.

    Args:
      view: The view of the leaf.
      sharding: Sharding of the leaf.
    """
    axes, lost = _kept(view, axes_of(sharding, len(view.shape)))
    return fit(view.view_shape, sharding, axes, lost)


def moved_axes(view: ResolvedAxes, sharding: NamedSharding) -> tuple[str, ...]:
    """Returns the mesh axes of a leaf that its view cannot be sharded by in place.

    Args:
      view: The view of the leaf.
      sharding: Sharding of the leaf.
    """
    axes = axes_of(sharding, len(view.shape))
    lost = _kept(view, axes)[1]
    return tuple(name for name in lost if sharding.mesh.shape[name] > 1)


def _kept(view: ResolvedAxes, axes: Axes) -> tuple[Axes, list[str]]:
    """Returns the mesh axes of the dimensions of a view, and those left over."""
    whole = [() if axis in view.split else axes[axis] for axis in range(len(axes))]
    first = lambda group: next((i for i in group if view.shape[i] > 1), group[0])
    places = [*view.batch, first(view.fan_in), first(view.fan_out)]
    kept = (*((),) * len(view.parts), *(whole[i] for i in places))
    used = {name for names in kept for name in names}
    return kept, [name for names in axes for name in names if name not in used]


def fit(
    shape: tuple[int, ...],
    sharding: NamedSharding,
    axes: Axes | None = None,
    spare: Sequence[str] = (),
) -> NamedSharding:
    """Returns a sharding that divides `shape`, on the mesh of another.

    Args:
      shape: Shape of the array.
      sharding: Sharding whose mesh to use.
      axes: Mesh axes wanted for each dimension; those of `sharding` if not given. One
        that does not divide its dimension becomes a spare one.
      spare: Axes for the first dimension that they divide; if none, they are dropped.
    """
    axes = axes_of(sharding, len(shape)) if axes is None else axes
    placed: list[list[str]] = [[] for _ in shape]

    def place(axis: str, d: int) -> bool:
        fits = shape[d] % ways(sharding, [*placed[d], axis]) == 0
        if fits:
            placed[d].append(axis)
        return fits

    spare = list(spare)
    for d, wanted in enumerate(axes):
        spare += [axis for axis in wanted if not place(axis, d)]
    for axis in spare:
        any(place(axis, d) for d in range(len(shape)))
    return with_axes(sharding, placed)


def replicated(sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding of an array that each device of a mesh holds in full."""
    return with_axes(sharding, ())


def with_axes(sharding: NamedSharding, axes: Sequence[Sequence[str]]) -> NamedSharding:
    """Returns a sharding by these axes, on the mesh and in the memory of another."""
    entries = [names[0] if len(names) == 1 else tuple(names) or None for names in axes]
    return NamedSharding(
        sharding.mesh, PartitionSpec(*entries), memory_kind=sharding.memory_kind
    )
