"""Facts that transforms settle at `init`, for reports and placement.

A state is arrays: it does not say which axes of a leaf were seen as a matrix, or why a
parameter is left to AdamW. The transforms that settle such things tell it here while
they are initialised, so that reports and placement ask the code that decides and do not
decide again.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax
import optax

from nanochat_jax.transforms.axes import ResolvedAxes


@dataclasses.dataclass
class Record:
    """Facts by path of the parameter.

    Attributes:
      views: How leaves that are not matrices as they are were seen.
      roles: Part that each parameter plays, and why; empty without
        `partition_by_role`.
      optimizers: Notes on the optimizer of each parameter.
      averages: View of each parameter whose weights are averaged, `None` where it is
        averaged as it is.
      stacks: Shardings of arrays with an entry for each matrix of a stack, by path of
        its first member.
    """

    views: dict[str, ResolvedAxes] = dataclasses.field(default_factory=dict)
    roles: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizers: dict[str, Any] = dataclasses.field(default_factory=dict)
    averages: dict[str, ResolvedAxes | None] = dataclasses.field(default_factory=dict)
    stacks: dict[str, Any] = dataclasses.field(default_factory=dict)


_VIEWS: ContextVar[Mapping[str, ResolvedAxes]] = ContextVar("_VIEWS", default={})  # noqa: B039
_RECORD: ContextVar[Record | None] = ContextVar("_RECORD", default=None)


@contextlib.contextmanager
def recording() -> Iterator[Record]:
    """Collects what transforms tell that are initialised meanwhile.

    Yields:
      A record, filled as they do.
    """
    found = Record()
    token = _RECORD.set(found)
    try:
        yield found
    finally:
        _RECORD.reset(token)


@contextlib.contextmanager
def seen(views: Mapping[str, ResolvedAxes]) -> Iterator[None]:
    """Marks an `init` that is given parameters in views.

    Args:
      views: The views by path.
    """
    token = _VIEWS.set(views)
    try:
        yield
    finally:
        _VIEWS.reset(token)


def view_of(name: str) -> ResolvedAxes | None:
    """Returns the view in which the present `init` is given a parameter, if in one.

    Args:
      name: Path of the parameter.
    """
    return _VIEWS.get().get(name)


def is_recording() -> bool:
    """Returns whether anybody listens."""
    return _RECORD.get() is not None


def tell(**kinds: Mapping[str, Any]) -> None:
    """Adds entries to the record, if there is one.

    Args:
      **kinds: Entries by field of `Record`.
    """
    found = _RECORD.get()
    if found is not None:
        for kind, entries in kinds.items():
            getattr(found, kind).update(entries)


def recorded_init(
    tx: optax.GradientTransformation, params: optax.Params
) -> tuple[optax.OptState, Record]:
    """Returns the state of `tx` as shapes, and the facts that its `init` tells.

    Args:
      tx: A transformation.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s; leaves that are neither
        are passed on as they are.
    """
    # An `init` that was compiled before would tell nothing.
    with recording() as found, jax.disable_jit():
        return abstract_init(tx, params), found


def abstract_init(
    tx: optax.GradientTransformation, params: optax.Params
) -> optax.OptState:
    """Returns shapes and types of `tx.init(params)`.

    Args:
      tx: A transformation.
      params: As for `recorded_init`.
    """
    leaves, treedef = jax.tree.flatten(params)
    is_array = [hasattr(x, "dtype") for x in leaves]

    def init(arrays: list[Any]) -> optax.OptState:
        rest = iter(arrays)
        mixed = [next(rest) if a else x for x, a in zip(leaves, is_array, strict=True)]
        return tx.init(treedef.unflatten(mixed))

    return jax.eval_shape(init, [x for x in leaves if hasattr(x, "dtype")])
