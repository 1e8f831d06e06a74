"""Settings as frozen dataclasses, read from flat TOML files and checked key by key.

A file is one flat table whose keys are field names. Every offence in it is reported in
one message that names file, key, what was got and what is allowed.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Reads a flat TOML file.

    Args:
      path: File to read.

    Returns:
      Its keys and values.

    Raises:
      ValueError: If the file is missing, is not TOML, or has tables.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file. Give the path of a TOML file."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}.") from None
    tables = [key for key, value in values.items() if isinstance(value, dict)]
    if tables:
        raise ValueError(
            f"{path}: settings are one flat table, but it has the tables {tables}. "
            "Move their keys to the top of the file and delete the headers."
        )
    return values


def check_keys(values: Iterable[str], known: Iterable[str], source: str) -> None:
    """Refuses unknown keys and names the nearest known one for each.

    Args:
      values: Keys to check.
      known: Keys that are allowed.
      source: Where the keys come from, for the message.

    Raises:
      ValueError: If a key is not known.
    """
    known = sorted(known)
    unknown = [key for key in values if key not in known]
    if not unknown:
        return
    lines = []
    for key in unknown:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        lines.append(f"{source}: unknown key `{key}`.{hint}")
    raise ValueError("\n".join([*lines, f"Known keys: {', '.join(known)}."]))


def build(cls: type[T], values: Mapping[str, Any], source: str) -> T:
    """Builds the dataclass `cls` from those of `values` that are its fields.

    Args:
      cls: Dataclass whose `__post_init__` checks the ranges.
      values: Values by field name; other keys are left alone.
      source: Where the values come from, for the message.

    Returns:
      An instance of `cls`.

    Raises:
      ValueError: If a value has the wrong type or is not allowed.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    chosen, errors = {}, []
    for key in fields.keys() & values.keys():
        try:
            chosen[key] = _coerce(values[key], fields[key])
        except TypeError as error:
            errors.append(f"{source}: `{key}` {error}")
    if errors:
        raise ValueError("\n".join(sorted(errors)))
    try:
        return cls(**chosen)
    except ValueError as error:
        raise ValueError(
            "\n".join(f"{source}: {line}" for line in str(error).splitlines())
        ) from None


def require(*checks: tuple[bool, str]) -> None:
    """Raises one `ValueError` with the messages of all checks that failed.

    Args:
      *checks: Pairs of a condition and the message for when it does not hold.

    Raises:
      ValueError: If a condition does not hold.
    """
    failed = [message for holds, message in checks if not holds]
    if failed:
        raise ValueError("\n".join(failed))


def lower_bounds(config: Any, bounds: Mapping[str, float]) -> list[tuple[bool, str]]:
    """Returns checks, for `require`, that fields are `None` or at least a bound.

    Args:
      config: Dataclass instance.
      bounds: Least value by field name.
    """
    values = {name: getattr(config, name) for name in bounds}
    return [
        (
            values[name] is None or values[name] >= low,
            f"`{name}` must be at least {low}, got {values[name]}.",
        )
        for name, low in bounds.items()
    ]


def _coerce(value: Any, hint: Any) -> Any:
    """Returns `value` as `hint` wants it, or raises `TypeError` with what is wrong."""
    options = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        if value not in options or isinstance(value, bool):
            raise TypeError(f"must be one of {list(options)}, got {value!r}.")
        return value
    if origin in (types.UnionType, typing.Union):
        return _coerce(value, next(o for o in options if o is not type(None)))
    if origin is tuple and options[-1] is Ellipsis:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise TypeError(f"must be a list, got {value!r}.")
        return tuple(_coerce(v, options[0]) for v in items)
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(options):
            raise TypeError(f"must be a list of {len(options)} values, got {value!r}.")
        return tuple(_coerce(v, o) for v, o in zip(value, options, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError(
            f"must be of type {hint.__name__}, got {value!r} ({type(value).__name__})."
        )
    return value
