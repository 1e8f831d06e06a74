"""Values of Python from text."""

import json
import types
import typing
from collections.abc import Sequence
from typing import Any

from nanochat_jax.config import coerce, spelling

_NUMBERS = {int: "a whole number", float: "a number"}


def value_of(words: Sequence[str], hint: Any) -> Any:
    """Returns the value that a flag's words stand for.

    Example:
      >>> value_of(["0.9", "0.95"], tuple[float, float])
      (0.9, 0.95)

    Args:
      words: Words behind the flag.
      hint: Type of its value.

    Raises:
      ValueError: If the words do not fit the type. The message goes on from the name of
        the flag.
    """
    if typing.get_origin(hint) is not tuple:
        return _one(",".join(words), hint)
    items = typing.get_args(hint)
    if items[-1] is Ellipsis:
        return tuple(_one(word, items[0]) for word in words)
    return tuple(_one(word, item) for word, item in zip(words, items, strict=True))


def parse_table(text: str) -> dict[str, Any]:
    """Returns the table of a flag.

    Example:
      >>> parse_table("data=2,fsdp=4")
      {'data': 2, 'fsdp': 4}

    Args:
      text: Keys and numbers, `key=number,key=number`.

    Raises:
      ValueError: If `text` has another form.
    """
    pairs = [pair.partition("=")[::2] for pair in text.split(",") if pair]
    try:
        return {key.strip(): json.loads(value) for key, value in pairs}
    except json.JSONDecodeError:
        raise ValueError(
            f"must be `key=number,key=number`, such as `data=2,fsdp=4`, got {text!r}."
        ) from None


def _one(text: str, hint: Any) -> Any:
    """Returns the value of one word."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _any(text, options)
    if origin is typing.Literal:
        return _choice(text, options)
    if origin is dict:
        return coerce.coerce(parse_table(text), hint)
    if hint is str:
        return text
    try:
        return coerce.coerce(hint(text), hint)
    except ValueError:
        raise ValueError(f"must be {_NUMBERS[hint]}, got {text!r}.") from None
    except TypeError as error:
        raise ValueError(str(error)) from None


def _any(text: str, options: Sequence[Any]) -> Any:
    """Returns the value of a word that may be of several types, the first that fits."""
    if type(None) in options and text in ("none", "None"):
        return None
    errors = []
    for option in options:
        if option is not type(None):
            try:
                return _one(text, option)
            except ValueError as error:
                errors.append(str(error))
    raise ValueError(errors[-1])


def _choice(text: str, options: Sequence[Any]) -> Any:
    by_name = {str(option): option for option in options}
    if text in by_name:
        return by_name[text]
    hint = spelling.question(spelling.meant(text.lower(), by_name))
    raise ValueError(
        f"must be one of {', '.join(by_name)}, got {text!r}. {hint}".strip()
    )
