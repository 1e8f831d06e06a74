"""Flags of a command, from the fields of its dataclass."""

import dataclasses
import typing
from typing import Any, NamedTuple

from nanochat_jax.config import schema

POSITIONAL = "Positional"
"""Mark of a field that is given without a flag: `Annotated[..., POSITIONAL]`."""


class Flag(NamedTuple):
    """A flag, or a value that is given without one.

    Attributes:
      field: Name of the field.
      name: As it is typed, such as `--galore-rank`; `RUN` for values without a flag. A
        field annotated with a text that begins with `--` has this name.
      hint: Type of the field.
      is_required: Whether the field has no default.
    """

    field: str
    name: str
    hint: Any
    is_required: bool

    @property
    def is_positional(self) -> bool:
        """Whether it is given without a flag."""
        return not self.name.startswith("-")

    @property
    def is_switch(self) -> bool:
        """Whether it takes no value."""
        return self.hint is bool

    @property
    def takes(self) -> int | None:
        """Number of values that it takes; `None` for one or more."""
        if self.is_switch:
            return 0
        if typing.get_origin(self.hint) is dict:
            return None
        if typing.get_origin(self.hint) is not tuple:
            return 1
        items = typing.get_args(self.hint)
        return None if items[-1] is Ellipsis else len(items)


def flags_of(kind: Any) -> dict[str, Flag]:
    """Returns the flags of a command by field.

    Args:
      kind: Dataclass of the command.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        field.name: _flag(field, hints[field.name])
        for field in dataclasses.fields(kind)
        if has_flag(kind, field.name)
    }


def has_flag(kind: Any, field: str) -> bool:
    """Returns whether a field of a command is a flag: not tables of a file.

    Args:
      kind: Dataclass of the command.
      field: Name of the field.
    """
    known = schema.declared(kind).get(field)
    return known is None or known.flag


def _flag(field: dataclasses.Field[Any], hint: Any) -> Flag:
    marks = [str(mark) for mark in getattr(hint, "__metadata__", ())]
    names = [mark for mark in marks if mark.startswith("--")]
    name = names[0] if names else f"--{field.name.replace('_', '-')}"
    if POSITIONAL in marks:
        name = field.name.removesuffix("s").upper()
    required = field.default is field.default_factory is dataclasses.MISSING
    return Flag(field.name, name, typing.get_args(hint)[0] if marks else hint, required)
