"""Keys and values of settings that earlier versions had.

A removed key is accepted at the value at which it did nothing, so that files and
checkpoints which record it go on working, and refused by name at any other.
"""

from collections.abc import Mapping
from typing import Any

from nanochat_jax.config import schema

REMOVED: dict[str, Any] = {
    "galore_adaptive": False,
    "galore_match_norm": False,
    "galore_momentum_share": 0.0,
    "galore_scale": 1.0,
    "galore_stagger": False,
    "galore_warm_start": False,
    "quant_codec": "int8",
    "quant_scale_dtype": "bfloat16",
}
"""Removed keys, and the value at which each did nothing."""

_REMOVED_VALUES: dict[str, Any] = {
    "galore_rest_bits": 8,
    "ns_dtype": "float16",
    "projector_bits": 16,
    "quant_bits": 2,
}
_LAST = "nanochat-jax 0.1.0"


def without_removed(recorded: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns recorded settings without the keys that are removed.

    Args:
      recorded: Settings by key, as a checkpoint records them.
      source: Where they come from, for the message.

    Raises:
      ValueError: If a removed key or value had an effect; it lists all of them.
    """
    schema.require(*((False, f"{source}: {line}") for line in refused(recorded)))
    return {key: value for key, value in recorded.items() if key not in REMOVED}


def refused(values: Mapping[str, Any]) -> list[str]:
    """Returns a line for each setting that only earlier versions can follow.

    Args:
      values: Settings by key.
    """
    gone = [key for key in REMOVED if key in values and values[key] != REMOVED[key]]
    gone += [key for key, was in _REMOVED_VALUES.items() if _same(values.get(key), was)]
    gone += ["galore_rank"] * isinstance(values.get("galore_rank"), Mapping)
    return [
        f"`{key}` = {values[key]!r} is no longer supported; the last version that had "
        f"it is {_LAST}. Leave it out, or use that version."
        for key in gone
    ]


def _same(value: Any, removed: Any) -> bool:
    return (type(value), value) == (type(removed), removed)
