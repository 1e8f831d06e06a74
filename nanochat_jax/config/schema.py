"""Settings as frozen dataclasses, read from flat TOML files and checked key by key.

A file is one flat table whose keys are field names. Every offence in it is reported in
one message that names file, key, what was got and what is allowed.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

Check = tuple[bool, str]
"""A condition, and the message for when it does not hold."""


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
        raise ValueError(f"{path}: cannot be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}.") from None
    found = [k for k, v in values.items() if isinstance(v, dict) and k not in tables]
    if found:
        raise ValueError(
            f"{path}: settings are one flat table, but it has the tables {found}. "
            "Move their keys to the top of the file and delete the headers."
        )
    return values


def build(
    cls: type[T], values: Mapping[str, Any], source: str, others: Iterable[str] = ()
) -> T:
    """Builds the dataclass `cls` from those of `values` that are its fields.

    Args:
      cls: Dataclass whose `__post_init__` checks types and ranges.
      values: Values by field name.
      source: Where the values come from, for the message.
      others: Keys that are allowed too, and left alone.

    Returns:
      An instance of `cls`.

    Raises:
      ValueError: If a key is not known, or a value has the wrong type or is not
        allowed. Ranges are checked with defaults in place of values of a wrong type.
    """
    fields, chosen = _types(cls), {}
    errors = _unknown_keys(values, {*fields, *others})
    for key, value in values.items():
        if key in fields:
            try:
                chosen[key] = _coerce(value, fields[key])
            except TypeError as error:
                errors.append(f"`{key}` {error}")
    try:
        config = cls(**chosen)
        if not errors:
            return config
    except ValueError as error:
        errors += str(error).splitlines()
    raise ValueError("\n".join(f"{source}: {line}" for line in errors)) from None


def check_types(config: Any) -> None:
    """Refuses values that are not of the type of their field.

    What stands for a value of that type, such as a NumPy number, is replaced by it.

    Args:
      config: Dataclass instance, which may be frozen.

    Raises:
      ValueError: If a value has the wrong type, or is a float that is not finite.
    """
    errors = []
    for key, hint in _types(type(config)).items():
        value = getattr(config, key)
        try:
            object.__setattr__(config, key, _coerce(value, hint))
        except TypeError as error:
            errors.append((False, f"`{key}` {error}"))
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


def describe(title: str, derived: Mapping[str, Any], config: Any) -> str:
    """Returns in words what settings follow from another, and what was set otherwise.

    Args:
      title: What they follow from.
      derived: Their values by key.
      config: The settings in use.
    """
    pairs = [(key, value, getattr(config, key)) for key, value in derived.items()]
    taken = [f"{key} {value}" for key, value, used in pairs if used == value]
    other = [
        f"{key} {used} (not {value})" for key, value, used in pairs if used != value
    ]
    lines = [f"{title}: {', '.join(taken)}"]
    return "\n".join(lines + [f"  set otherwise: {', '.join(other)}"] * bool(other))


def _types(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _unknown_keys(values: Iterable[str], known: Iterable[str]) -> list[str]:
    """Returns a line for each unknown key, with the nearest known one."""
    lines, known = [], sorted(known)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean `{near[0]}`?" if near else f"Known: {known}."
            lines.append(f"unknown key `{key}`. {hint}")
    return lines


def _coerce(value: Any, hint: Any) -> Any:
    """Returns `value` as `hint` wants it, or raises `TypeError` with what is wrong."""
    options = typing.get_args(hint)
    origin = typing.get_origin(hint)
    value = _as_python(value)
    if origin is typing.Literal:
        if (type(value), value) not in [(type(o), o) for o in options]:
            raise TypeError(f"must be one of {list(options)}, got {value!r}.")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in options:
            return None
        return _coerce_to_any(value, [o for o in options if o is not type(None)])
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError(f"must be a table, got {value!r}.")
        return {k: _coerce(v, options[1]) for k, v in value.items()}
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
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"must be finite, got {value}.")
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError(
            f"must be of type {hint.__name__}, got {value!r} ({type(value).__name__})."
        )
    return value


def _as_python(value: Any) -> Any:
    """Returns a number of Python for one of NumPy or JAX, and other values as they are.

    Raises:
      TypeError: If the number is traced.
    """
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except Exception:
        raise TypeError(
            "must be known when the settings are made, got a traced value. "
            "`build_optimizer(..., learning_rate=)` and `muon` take one."
        ) from None


def _coerce_to_any(value: Any, options: list[Any]) -> Any:
    """Returns `value` as the first of `options` that it fits."""
    errors = []
    for option in options:
        try:
            return _coerce(value, option)
        except TypeError as error:
            errors.append(str(error))
    raise TypeError(" Or ".join(errors))
