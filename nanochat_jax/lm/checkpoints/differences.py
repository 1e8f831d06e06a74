"""Differences of two records or layouts, key by key."""

import functools
import json
import operator
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np


def check_meta(
    stored: Mapping[str, Any],
    current: Mapping[str, Any],
    *,
    ignore: Collection[str] = (),
    flags: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Refuses to go on from a checkpoint with other settings.

    Args:
      stored: Record of the checkpoint, from `Checkpoints.read_meta`.
      current: The same record of this run. Keys of nested records are joined by dots.
      ignore: Keys that may differ, with their dots, and all keys below them.
      flags: Options that let keys differ, for the message.

    Raises:
      ValueError: If values differ, or a key is in one record only. All are listed.
    """
    changed = changes(flat(stored), flat(current))
    below = tuple(f"{key}." for key in ignore)
    offending = {
        key: both
        for key, both in changed.items()
        if key not in ignore and not key.startswith(below)
    }
    if not offending:
        return
    hints = [
        f"`{flag}` lets these differ: {', '.join(named)}.\n"
        for flag, keys in (flags or {}).items()
        if (named := [key for key in offending if key in keys])
    ]
    raise ValueError(
        "The checkpoint is from a run with other settings.\n"
        f"{listed(differences(offending, 'now'), most=len(offending))}\n"
        f"{''.join(hints)}Set these as they were, by leaving out the flags or the "
        "`--config-file` that change them, or train from the start in a new "
        "`--checkpoint-dir`."
    )


def as_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record as JSON gives it back: tuples are lists, keys are strings."""
    return json.loads(json.dumps(dict(meta)))


def flat(record: Mapping[str, Any]) -> dict[str, str]:
    """Returns the values of nested records as text, their keys joined by dots."""
    return _flat(as_json(record))


def layout(tree: Any) -> dict[str, str]:
    """Returns dtype and shape by path, such as `int8[4,8]`; keys become text."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    describe = lambda x: f"{np.dtype(x.dtype).name}{list(x.shape)}".replace(" ", "")
    return {name(path): describe(leaf) for path, leaf in leaves}


def changes(
    old: Mapping[str, str], new: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """Returns the two values of each key at which records differ."""
    return {
        key: (old.get(key, "none"), new.get(key, "none"))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def differences(changed: Mapping[str, tuple[str, str]], word: str) -> list[str]:
    """Returns a line for each key at which two records differ."""
    return [f"{key}: stored {old}, {word} {new}" for key, (old, new) in changed.items()]


def listed(lines: list[str], most: int = 10) -> str:
    """Returns the first `most` lines, indented, and how many there are besides."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join(f"  {line}" for line in lines[:most] + more)


def _flat(record: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(record, list) and all(isinstance(x, dict) for x in record):
        # Tables, such as groups: what they do not say may be a newer setting.
        given = ({k: x for k, x in table.items() if x is not None} for table in record)
        record = {str(i): table for i, table in enumerate(given)} or []
    if not isinstance(record, dict):
        return {prefix.removesuffix("."): repr(record)}
    parts = (_flat(value, f"{prefix}{key}.") for key, value in record.items())
    return functools.reduce(operator.or_, parts, {})
