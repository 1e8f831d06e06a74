"""Settings as frozen dataclasses, read from flat TOML files and checked key by key.

A file is one flat table whose keys are field names. Every error in it is reported in
one message that names file, key, what was got and what is allowed.
"""

import dataclasses
import textwrap
import tomllib
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from nanochat_jax.config import spelling
from nanochat_jax.config.coerce import coerce

T = TypeVar("T")

Check = tuple[bool, str]
"""A condition, and the message for when it does not hold."""

Affects = Literal["numbers", "storage", "course", "nothing"]

_METADATA = "setting"
_WIDTH, _HELD = 80, "\0"


class Setting(NamedTuple):
    """Facts about a key of the settings, declared once, at its field.

    Attributes:
      group: Title under which `--help` lists it.
      least: Smallest value that is allowed, if there is one.
      affects: "numbers", the numbers that a run computes; "storage", how the
        optimizer's state is stored; "course", how a run goes on from any of its steps:
        on which devices, what it measures, which steps it skips; or "nothing", no
        number of a run's results.
      needs: Switches, other keys, of which one must be on for this key to matter.
      adamw: Whether the AdamW baselines have a use for it.
      flag: Whether it is a flag of commands too.
    """

    group: str
    least: float | None = None
    affects: Affects = "numbers"
    needs: tuple[str, ...] = ()
    adamw: bool = False
    flag: bool = True


def setting(default: Any, **described: Any) -> Any:
    """Declares a field of a settings dataclass.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Optimizer:
      ...     lr: float = setting(0.02, group="Optimizer", least=0)
      >>> declared(Optimizer)["lr"].least
      0

    Args:
      default: Value if the key is not set, or a function that makes it, such as `dict`.
      **described: Attributes of its `Setting`.

    Returns:
      A field for `dataclasses.dataclass`.
    """
    metadata = {_METADATA: Setting(**described)}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def declared(cls: Any) -> dict[str, Setting]:
    """Returns the declarations of the keys of a dataclass, by name.

    Fields that no `setting` declared, such as the flags of a command, are left out.

    Args:
      cls: Dataclass, or an instance of one.
    """
    fields = {field.name: field.metadata for field in dataclasses.fields(cls)}
    return {key: data[_METADATA] for key, data in fields.items() if _METADATA in data}


def affecting(cls: Any, *affected: Affects) -> tuple[str, ...]:
    """Returns the keys of a dataclass that affect one of some things, in order.

    Args:
      cls: Dataclass of settings.
      *affected: What they affect; see `Setting`.
    """
    keys = declared(cls).items()
    return tuple(sorted(key for key, known in keys if known.affects in affected))


def read_toml(path: str | Path, tables: Collection[str] = ()) -> dict[str, Any]:
    """Reads a flat TOML file.

    Args:
      path: File to read.
      tables: Keys whose value may be a table.

    Returns:
      Its keys and values.

    Raises:
      ValueError: If the file is missing, is not TOML, or has other tables.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file. Give the path of a TOML file."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{path}: cannot be read: {why}. Give the path of a TOML file."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}.") from None
    found = [k for k, v in values.items() if isinstance(v, dict) and k not in tables]
    if found:
        raise ValueError(
            f"{path}: settings are one flat table, but it has the tables {found}. "
            "Move their keys to the top of the file and delete the headers. Only "
            "`[[group]]`, with two brackets, is a table of its own."
        )
    return values


def build(
    cls: type[T],
    values: Mapping[str, Any],
    source: str,
    others: Iterable[str] = (),
    errors: Iterable[str] = (),
) -> T:
    """Builds a dataclass from the values of its fields.

    Args:
      cls: Dataclass whose `__post_init__` checks types and ranges.
      values: Values by field name.
      source: Where the values come from, for the message.
      others: Keys that are allowed too, and left alone.
      errors: Errors found before, to be reported in the same message.

    Returns:
      An instance of `cls`.

    Raises:
      ValueError: If a key is not known, or a value has the wrong type or is not
        allowed. Ranges are checked with defaults in place of values of a wrong type.
    """
    fields, chosen = _types(cls), {}
    errors = [*errors, *_unknown_keys(values, {*fields, *others})]
    for key, value in values.items():
        if key in fields:
            try:
                chosen[key] = coerce(value, fields[key])
            except TypeError as error:
                errors += [f"`{key}` {line}" for line in str(error).splitlines()]
    try:
        config = cls(**chosen)
        if not errors:
            return config
    except ValueError as error:
        errors += str(error).splitlines()
    raise ValueError("\n".join(f"{source}: {line}" for line in errors)) from None


def check_types(config: Any) -> None:
    """Refuses values that are not of the type of their field.

    Numbers of NumPy and JAX are replaced by the numbers of Python that they stand for.

    Args:
      config: Dataclass instance, which may be frozen.

    Raises:
      ValueError: If a value has the wrong type, or is a float that is not finite.
    """
    errors = []
    for key, hint in _types(type(config)).items():
        value = getattr(config, key)
        try:
            object.__setattr__(config, key, coerce(value, hint))
        except TypeError as error:
            lines = str(error).splitlines()
            errors += [(False, f"`{key}` {line}") for line in lines]
    require(*errors)


def require(*checks: Check) -> None:
    """Raises one `ValueError` with the messages of all checks that failed.

    Args:
      *checks: Pairs of a condition and the message for when it does not hold.

    Raises:
      ValueError: If a condition does not hold.
    """
    failed = [message for holds, message in checks if not holds]
    if failed:
        raise ValueError("\n".join(failed))


def lower_bounds(config: Any, bounds: Mapping[str, float]) -> list[Check]:
    """Returns checks, for `require`, that numbers are at least a bound.

    Args:
      config: Dataclass instance.
      bounds: Least value by field name.
    """
    values = {name: getattr(config, name) for name in bounds}
    return [
        (
            not isinstance(values[name], int | float) or values[name] >= low,
            f"`{name}` must be at least {low}, got {values[name]}.",
        )
        for name, low in bounds.items()
    ]


def describe(title: str, derived: Mapping[str, Any], config: Any) -> str:
    """Describes the settings that follow from another, and those set otherwise.

    Args:
      title: Name and value of the setting that they follow from.
      derived: Values that follow, by key.
      config: The settings in use.
    """
    pairs = [(key, value, getattr(config, key)) for key, value in derived.items()]
    taken = [f"{key} {value}" for key, value, used in pairs if used == value]
    other = [
        f"{key} {used} (not {value})" for key, value, used in pairs if used != value
    ]
    lines = [_listed(f"{title}:", taken)]
    lines += [_listed("  set otherwise:", other)] * bool(other)
    return "\n".join(lines)


def _listed(title: str, items: Iterable[str]) -> str:
    """Returns a title and items in lines that end between two items."""
    held = (item.replace(" ", _HELD) for item in items)
    text = textwrap.fill(f"{title} {', '.join(held)}", _WIDTH, subsequent_indent="    ")
    return text.replace(_HELD, " ")


def _types(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _unknown_keys(values: Iterable[str], known: Iterable[str]) -> list[str]:
    """Returns a line for each unknown key, with the known ones that may be meant."""
    lines, known = [], sorted(known)
    for key in values:
        if key not in known:
            hint = spelling.question(spelling.meant(key, known))
            hint = hint or "`nanochat-jax train --help` lists the settings."
            lines.append(f"unknown key `{key}`. {hint}")
    return lines
