"""Declarations of parameters by the classes of modules."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

Role = Literal["matrix", "vector", "embedding"]


class Place(NamedTuple):
    """A field of a module.

    Attributes:
      module: The module that the field is part of.
      name: Name of the field.
      parent: Module that holds this one, if there is one.
      parent_name: Name of the module in its parent.
      value: The field: an array, or a node that holds one array.
    """

    module: Any
    name: str
    parent: Any = None
    parent_name: str = ""
    value: Any = None


@dataclasses.dataclass(frozen=True)
class Declared:
    """One parameter, as the class that made it declares it, not stacked.

    Attributes:
      role: Label of the parameter.
      shape: Shape that the class gives it, `None` for a size that it does not store;
        `None` if the class tells no shape.
      fan_in: Axes of `shape` that the layer sums over.
      fan_out: Axes of `shape` that the layer makes.
      gates: For an axis that holds several gates side by side, how many.
      heads: For an axis that holds attention heads, how many.
      source: Name of the class.
    """

    role: Role
    shape: tuple[int | None, ...] | None = None
    fan_in: tuple[int, ...] = ()
    fan_out: tuple[int, ...] = ()
    gates: Mapping[int, int] = dataclasses.field(default_factory=dict)
    heads: Mapping[int, int] = dataclasses.field(default_factory=dict)
    source: str = ""


def vector(*shape: int) -> Declared:
    """Returns a vector; its shape, if given, is evidence on stacked axes."""
    return Declared("vector", shape or None)


def embedding(*shape: int) -> Declared:
    """Returns an embedding table."""
    return Declared("embedding", shape or None)


def matrix(
    shape: Sequence[int | None],
    fan_in: Sequence[int],
    fan_out: Sequence[int],
    source: str,
    *,
    gates: Mapping[int, int] | None = None,
    heads: Mapping[int, int] | None = None,
) -> Declared:
    """Returns a matrix; axes may count from the end of `shape`."""
    ndim = len(shape)
    place = lambda axes: tuple(axis % ndim for axis in axes)
    return Declared(
        "matrix",
        tuple(shape),
        place(fan_in),
        place(fan_out),
        gates or {},
        heads or {},
        source,
    )


def from_einsum(equation: str, shape: Sequence[int], source: str) -> Declared | None:
    """Returns what `einsum(equation, input, kernel)` declares of its kernel.

    Axes that input and kernel share are summed over unless the result has them; axes
    that kernel and result share are made; axes of all three are a batch, and so are
    axes that the result has before all axes of the input, such as `C` in
    `"BSD,CKDH->CBSKH"`: several maps side by side.

    Args:
      equation: With an arrow and two operands.
      shape: Shape of the kernel.
      source: Name of the class.

    Returns:
      A matrix; a vector if nothing is summed over or made; `None` if the axes of the
      kernel are not one letter each, or one of them is in the kernel alone.
    """
    operands, _, result = equation.replace(" ", "").partition("->")
    inputs, _, kernel = operands.partition(",")
    if len({*kernel}) < len(shape) or not kernel.isalpha():
        return None
    if {*kernel} - {*inputs} - {*result}:
        return None
    axes = range(len(kernel))
    fan_in = [axis for axis in axes if kernel[axis] not in result]
    kept = [place for place, letter in enumerate(result) if letter in inputs]
    beside = result[: min(kept, default=0)]
    fan_out = [axis for axis in axes if kernel[axis] not in inputs + beside]
    if not fan_in or not fan_out:
        return vector(*shape)
    return matrix(shape, fan_in, fan_out, source)


def listed(value: Any) -> tuple[int, ...]:
    """Returns one or several integers as a tuple."""
    return (value,) if isinstance(value, int) else tuple(value)
