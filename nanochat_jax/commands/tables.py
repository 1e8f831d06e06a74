"""Settings that are tables in a TOML file, as flags: `--mesh data=2,fsdp=4`."""

import json
import typing
from collections.abc import Mapping
from typing import Any

from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
)

REGISTRY = ConstructorRegistry()
"""Constructors of these flags for tyro."""


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
        raise ValueError(f"must be `key=number,key=number`, got {text!r}.") from None


def format_table(table: Mapping[str, Any]) -> str:
    """Returns the text of a table; the inverse of `parse_table`."""
    return ",".join(f"{key}={value}" for key, value in table.items())


@REGISTRY.primitive_rule
def _read_table(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if typing.get_origin(info.type) is not dict:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="KEY=NUMBER,...",
        instance_from_str=lambda words: parse_table(words[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda table: [format_table(table)],
    )
