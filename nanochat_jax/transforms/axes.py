"""Which axes of a leaf are the rows and the columns of its matrices."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """Input and output axes of the linear map that a leaf holds.

    All other axes are a batch of matrices. Negative axes count from the end, so that
    one description serves a leaf and a stack of such leaves.

    Example:
      >>> query = MatrixAxes(fan_in=0, fan_out=(1, 2))  # [features, heads, head_dim]
      >>> query.view_shape((768, 12, 64))
      (768, 768)
      >>> conv = MatrixAxes(fan_in=(-3, -2, -1), fan_out=-4)  # [out, in, height, width]
      >>> conv.view_shape((5, 32, 16, 3, 3))
      (5, 144, 32)
      >>> gates = MatrixAxes(fan_in=1, fan_out=0, split={0: 4})  # `[4 hidden, in]`
      >>> gates.view_shape((64, 24))
      (4, 24, 16)

    Attributes:
      fan_in: Axes that are summed over, one or several.
      fan_out: Axes of the result, one or several.
      split: For an axis that holds several matrices side by side, such as the gates of
        an LSTM, how many; they become a batch. A mapping from axis to number.
      source: What the axes were derived from, such as `"flax.nnx.Linear"`; empty if
        they were given by hand. It takes no part in comparisons.

    Raises:
      TypeError: If an axis is not an integer.
      ValueError: If `fan_in` or `fan_out` is empty, an axis is there twice, or a number
        of parts is less than 1.
    """

    fan_in: int | tuple[int, ...]
    fan_out: int | tuple[int, ...]
    split: Mapping[int, int] | tuple[tuple[int, int], ...] = ()
    source: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        fan_in, fan_out = _as_axes(self.fan_in), _as_axes(self.fan_out)
        pairs = self.split.items() if isinstance(self.split, Mapping) else self.split
        split = tuple(sorted((int(axis), int(parts)) for axis, parts in pairs))
        for name, value in (("fan_in", fan_in), ("fan_out", fan_out), ("split", split)):
            object.__setattr__(self, name, value)
        if not fan_in or not fan_out:
            raise ValueError(f"`fan_in` and `fan_out` need an axis each, got {self}.")
        if len({*fan_in, *fan_out}) < len(fan_in) + len(fan_out):
            raise ValueError(f"an axis can stand in {self} only once.")
        if any(parts < 1 for _, parts in split):
            raise ValueError(f"`split` needs at least one part an axis, got {self}.")

    def resolve(self, shape: Shape) -> "ResolvedAxes":
        """Returns these axes for leaves of one shape.

        Args:
          shape: Shape of the leaf.

        Raises:
          ValueError: If the shape has no such axes, or an axis does not divide into its
            parts.
        """
        ndim = len(shape)
        fan_in, fan_out = _axes(self.fan_in), _axes(self.fan_out)
        split = dict(self.split)
        named = [*fan_in, *fan_out, *split]
        absent = [axis for axis in named if not -ndim <= axis < ndim]
        if absent:
            raise ValueError(f"{self} names the axes {absent}, which {shape} lacks.")
        fan_in, fan_out = (
            tuple(axis % ndim for axis in axes) for axes in (fan_in, fan_out)
        )
        if len({*fan_in, *fan_out}) < len(fan_in) + len(fan_out):
            raise ValueError(f"{self} names an axis of {shape} twice.")
        split = {axis % ndim: parts for axis, parts in split.items() if parts > 1}
        uneven = [axis for axis, parts in split.items() if shape[axis] % parts]
        if uneven:
            raise ValueError(
                f"{self} splits the axes {uneven} of {shape} into parts that do not "
                "divide them."
            )
        batch = tuple(i for i in range(ndim) if i not in (*fan_in, *fan_out))
        return ResolvedAxes(shape, batch, fan_in, fan_out, split)

    def view_shape(self, shape: Shape) -> Shape:
        """Returns the shape `[*batch, fan_in, fan_out]` in which a leaf is seen."""
        return self.resolve(shape).view_shape

    def __str__(self) -> str:
        split = f", split={dict(self.split)}" if self.split else ""
        return f"MatrixAxes(fan_in={self.fan_in}, fan_out={self.fan_out}{split})"


@dataclasses.dataclass(frozen=True)
class ResolvedAxes:
    """`MatrixAxes` for one shape, all axes counted from the front.

    Attributes:
      shape: Shape of the leaf.
      batch: Axes of the batch.
      fan_in: Axes that are summed over.
      fan_out: Axes of the result.
      split: Parts of the axes that hold several matrices side by side.
    """

    shape: Shape
    batch: Shape
    fan_in: Shape
    fan_out: Shape
    split: Mapping[int, int]

    @property
    def parts(self) -> Shape:
        """Numbers of parts of the split axes: further axes of the batch."""
        return tuple(self.split[axis] for axis in sorted(self.split))

    @property
    def view_shape(self) -> Shape:
        """Shape `[*parts, *batch, fan_in, fan_out]`."""
        size = lambda axes: math.prod(
            self.shape[axis] // self.split.get(axis, 1) for axis in axes
        )
        batch = tuple(
            self.shape[axis] // self.split.get(axis, 1) for axis in self.batch
        )
        return (*self.parts, *batch, size(self.fan_in), size(self.fan_out))

    @property
    def is_identity(self) -> bool:
        """Whether the view is the leaf as it is."""
        last = (len(self.shape) - 2,), (len(self.shape) - 1,)
        return not self.split and (self.fan_in, self.fan_out) == last

    def to_view(self, x: Array) -> Array:
        """Returns a leaf as `[*batch, fan_in, fan_out]`."""
        if self.is_identity:
            return x
        apart, order = self._apart()
        return jnp.reshape(jnp.transpose(jnp.reshape(x, apart), order), self.view_shape)

    def from_view(self, x: Array) -> Array:
        """Returns a leaf in its own shape; undoes `to_view`."""
        if self.is_identity:
            return x
        apart, order = self._apart()
        x = jnp.reshape(x, [apart[axis] for axis in order])
        back = sorted(range(len(order)), key=order.__getitem__)
        return jnp.reshape(jnp.transpose(x, back), self.shape)

    def _apart(self) -> tuple[list[int], list[int]]:
        """Returns the shape with split axes apart, and the order of its axes."""
        apart: list[int] = []
        place: dict[int, int] = {}  # position of the rest of an axis
        split: list[int] = []  # places of the parts
        for axis, size in enumerate(self.shape):
            if axis in self.split:
                split.append(len(apart))
                apart.append(self.split[axis])
            place[axis] = len(apart)
            apart.append(size // self.split.get(axis, 1))
        axes = (*self.batch, *self.fan_in, *self.fan_out)
        return apart, [*split, *(place[axis] for axis in axes)]


def as_axes(given: Any) -> MatrixAxes:
    """Returns `MatrixAxes` for a description of axes, ours or that of Optax.

    Args:
      given: `MatrixAxes`, or an `optax.contrib.MuonDimensionNumbers`.

    Raises:
      TypeError: If it is neither.
    """
    if isinstance(given, MatrixAxes):
        return given
    try:
        return MatrixAxes(given.reduction_axis, given.output_axis)
    except AttributeError:
        raise TypeError(
            "axes must be `MatrixAxes` or `optax.contrib.MuonDimensionNumbers`, got "
            f"{given!r}."
        ) from None


def _as_axes(axes: Any) -> tuple[int, ...]:
    axes = tuple(axes) if isinstance(axes, tuple | list) else (axes,)
    if not all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes):
        raise TypeError(f"axes must be integers, got {axes}.")
    return axes


def _axes(axes: int | tuple[int, ...]) -> tuple[int, ...]:
    """Returns axes that `__post_init__` has made a tuple."""
    return axes if isinstance(axes, tuple) else (axes,)
