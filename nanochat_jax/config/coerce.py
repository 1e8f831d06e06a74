"""Values as the types of their fields want them."""

import math
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any


def coerce(value: Any, hint: Any) -> Any:
    """Returns a value as the type of its field.

    Whole numbers are floats where those are asked for, lists are tuples, and numbers of
    NumPy and JAX are numbers of Python. Learning rates, which may be functions, may
    also be traced. A type with a class method `from_table` takes tables.

    Args:
      value: Value to convert.
      hint: Type of the field.

    Raises:
      TypeError: If it is of another type, or a float that is not finite. The message
        goes on from the name of the field.
    """
    options = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if _is_rate(hint) and (callable(value) or _is_traced(value)):
        return value
    value = _as_python(value)
    if origin is typing.Literal:
        if (type(value), value) not in [(type(o), o) for o in options]:
            raise TypeError(f"must be one of {list(options)}, got {value!r}.")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in options:
            return None
        options = tuple(o for o in options if typing.get_origin(o) is not Callable)
        return _coerce_to_any(value, [o for o in options if o is not type(None)])
    if hasattr(hint, "from_table"):
        return hint.from_table(value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError(f"must be a table, such as {{data = 2}}, got {value!r}.")
        return {k: coerce(v, options[1]) for k, v in value.items()}
    if origin is tuple and options[-1] is Ellipsis:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise TypeError(f"must be a list, got {value!r}.")
        return _coerce_each(items, options[0])
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(options):
            raise TypeError(f"must be a list of {len(options)} values, got {value!r}.")
        return tuple(coerce(v, o) for v, o in zip(value, options, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"must be finite, got {value}.")
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError(
            f"must be of type {hint.__name__}, got {value!r} ({type(value).__name__})."
        )
    return value


def _is_rate(hint: Any) -> bool:
    """Returns whether values of a type may be functions."""
    return any(typing.get_origin(o) is Callable for o in typing.get_args(hint))


def _is_traced(value: Any) -> bool:
    jax = sys.modules.get("jax")  # where it is not loaded, nothing is traced
    return jax is not None and isinstance(value, jax.core.Tracer)


def _as_python(value: Any) -> Any:
    """Returns a number of Python for one of NumPy or JAX, and other values as they are.

    Raises:
      TypeError: If the number is traced.
    """
    if _is_traced(value):  # even if `item` knows it, as under `jax.grad`
        raise TypeError(
            "must be known when the settings are made, got a traced value. `muon`, and "
            "`lr` and `fallback_lr` of an `OptimizerConfig`, take one."
        )
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    return value.item()


def _coerce_each(items: Any, hint: Any) -> tuple[Any, ...]:
    """Returns items as a type wants them; tables that are not allowed are all named."""
    if not hasattr(hint, "from_table"):
        return tuple(coerce(item, hint) for item in items)
    found, errors = [], []
    for item in items:
        try:
            found.append(coerce(item, hint))
        except TypeError as error:
            errors.append(str(error))
    if errors:
        raise TypeError("\n".join(errors))
    return tuple(found)


def _coerce_to_any(value: Any, options: list[Any]) -> Any:
    """Returns `value` as the first of `options` that it fits."""
    errors = []
    for option in options:
        try:
            return coerce(value, option)
        except TypeError as error:
            errors.append(str(error))
    raise TypeError(" Or ".join(errors))
