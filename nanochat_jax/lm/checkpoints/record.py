"""The JSON record beside a state, and the formats that can be read.

The record is JSON:

  format       layout of state and record, `FORMAT`
  config       settings of the run, by key
  config_hash  SHA-256 of the settings as JSON with sorted keys
  variant      name of the optimizer's variant
  data         fingerprint of the token ids
  tokenizer    fingerprint of the tokenizer, null if the ids are of an unknown one
  versions     versions of `PACKAGES`
  contains     "weights" if the optimizer's state is missing, else absent
  source       path and kind of the model that weights were imported from

A run that resumes must agree with `config`, `data` and `tokenizer`, as far as `resume`
says; the rest is for people. Format 1 had other names of fields and more settings.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from nanochat_jax.config import Config, without_removed
from nanochat_jax.lm.runtime import machine

FORMAT = 2
"""Layout of state and record that is written."""

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "nanochat-jax")
"""Packages whose versions are recorded."""

_RENAMED = {
    1: {"basis": "projector", "complement": "rest", "consecutive_skips": "in_a_row"},
    2: {},
}
"""Names of `NamedTuple` fields in an earlier format, by their names now."""


def make(config: Config, *, data: str, tokenizer: str | None) -> dict[str, Any]:
    """Returns the record of a run.

    Args:
      config: Settings of the run.
      data: Fingerprint of its token ids.
      tokenizer: Fingerprint of its tokenizer, if known.
    """
    settings = dataclasses.asdict(config)
    text = json.dumps(settings, sort_keys=True)
    return {
        "format": FORMAT,
        "config": settings,
        "config_hash": hashlib.sha256(text.encode()).hexdigest(),
        "variant": config.variant,
        "data": data,
        "tokenizer": tokenizer,
        "versions": machine.versions(PACKAGES),
    }


def make_imported(
    config: Config, *, tokenizer: str | None, source: str
) -> dict[str, Any]:
    """Returns the record of weights without a state to resume.

    Args:
      config: Settings of the model, and its tokenizer.
      tokenizer: Fingerprint of its tokenizer, if known.
      source: Origin of the weights, in words.
    """
    made = make(config, data="", tokenizer=tokenizer)
    return {**made, "contains": "weights", "source": source}


def require_state(meta: Mapping[str, Any], source: str) -> None:
    """Refuses to resume from weights alone.

    Args:
      meta: The record.
      source: Checkpoint that it is of, for messages.

    Raises:
      ValueError: If the checkpoint holds no state of an optimizer.
    """
    if meta.get("contains") == "weights":
        raise ValueError(
            f"{source}: weights alone, without the state of an optimizer, so there is "
            f"no run to resume. Start one from them: `--init-from {source}`."
        )


def settings_in(meta: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns all settings of a recorded run, in the keys of this version.

    Args:
      meta: The record.
      source: Checkpoint that it is of, for messages.

    Raises:
      ValueError: If the format is not read here, or a setting is no longer supported.
    """
    found = meta.get("format", "none")
    if found not in _RENAMED:
        writer = meta.get("versions", {}).get("nanochat-jax", "an earlier version")
        raise ValueError(
            f"{source}: the checkpoint has format {found}, and this version reads the "
            f"formats {[*_RENAMED]}. Resume it with nanochat-jax {writer}, or train "
            "from the start in a new directory."
        )
    return dataclasses.asdict(Config()) | without_removed(meta["config"], source)


def stored_names(meta: Mapping[str, Any]) -> Mapping[str, str]:
    """Returns the names under which fields of the state are stored, if not their own.

    Args:
      meta: The record.
    """
    return _RENAMED[meta["format"]]
