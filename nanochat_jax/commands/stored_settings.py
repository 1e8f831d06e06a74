"""Settings that a run takes from a model or a checkpoint, where they are not given."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat_jax.config import ModelConfig, derived_from, schema
from nanochat_jax.lm.checkpoints import Checkpoints, open_source, record

AUTO = "auto"
"""Value of `--resume` for a run that goes on if it can, and starts if it cannot."""


def derived_settings(
    values: Mapping[str, Any],
    resumed: str | None = None,
    checkpoint_dir: str | None = None,
    config_file: str | None = None,
) -> dict[str, Any]:
    """Returns the settings that follow from others, where they are not given.

    They are those of `derived_from`, and of the model that a run starts from. A run
    that goes on takes all settings from its checkpoint; with a file of settings it
    takes those of its model alone, which are not read from `init_from` again.

    Args:
      values: Values of a run by key.
      resumed: Checkpoint folder that the run goes on from, or "auto".
      checkpoint_dir: Folder that the run writes its checkpoints to, if given.
      config_file: TOML file that `values` come from, if one was given.

    Raises:
      ValueError: If there is no checkpoint to go on from, if `init_from` is given with
        another source of the model's shape, or if its model is not there.
    """
    first = values.get("init_from")
    both = [key for key in ("depth", "model") if key in values]
    schema.require(
        (
            first is None or not both,
            f"`init_from` and {' and '.join(f'`{key}`' for key in both)} both give the "
            "shape of the model. Set one of them.",
        )
    )
    derived = derived_from(values)
    folder = resumed_folder(resumed, checkpoint_dir)
    if folder is not None:
        stored = _stored_settings(folder, first)
        kept = stored if config_file is None else _of_first_model(stored)
        return {**kept, **derived}
    if first is None:
        return derived
    return {**open_source(first).settings, **derived}


def resumed_folder(resume: str | None, checkpoint_dir: str | None) -> str | None:
    """Returns the checkpoint folder that a run goes on from, `None` if it starts.

    Args:
      resume: Checkpoint folder, or "auto": `checkpoint_dir` if it has a checkpoint.
      checkpoint_dir: Folder that the run writes its checkpoints to, if given.

    Raises:
      ValueError: If there is no checkpoint in `resume`, or "auto" has no folder.
    """
    if resume is None:
        return None
    if resume == AUTO:
        schema.require(
            (
                checkpoint_dir is not None,
                "`resume` auto goes on from the last checkpoint in `--checkpoint-dir`, "
                "or starts if there is none. Give that folder too.",
            )
        )
        assert checkpoint_dir is not None
        return checkpoint_dir if _has_checkpoint(checkpoint_dir) else None
    schema.require(
        (
            not Path(resume).is_file(),
            f"`resume` must be a folder of checkpoints, but {resume} is a file.",
        )
    )
    schema.require(
        (
            _has_checkpoint(resume),
            f"`resume` is {resume}, and no checkpoint is there. `--resume {AUTO} "
            f"--checkpoint-dir {resume}` starts a run where there is none.",
        )
    )
    return resume


def _has_checkpoint(folder: str) -> bool:
    return Checkpoints(folder).latest_step() is not None


def _stored_settings(folder: str, first: str | None) -> dict[str, Any]:
    """Returns the settings of the run of a checkpoint, which started from `first`."""
    checkpoints = Checkpoints(folder)
    meta = checkpoints.read_meta(verify=False)
    record.require_state(meta, str(checkpoints.directory))
    stored = record.settings_in(meta, str(checkpoints.directory))
    was = stored["init_from"]
    same = None not in (first, was) and _absolute(str(was)) == _absolute(str(first))
    schema.require(
        (
            first is None or same,
            f"`init_from` is {first}, but the run to resume, in "
            f"{checkpoints.directory}, started from {was or 'random parameters'}. "
            "Leave `--init-from` out, or leave `--resume` out to start a new run.",
        )
    )
    return stored


def _of_first_model(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that a run took from the model that it started from."""
    if stored["init_from"] is None:
        return {}
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    kept = (*names, "tokenizer", "end_token", "init_from")
    return {name: stored[name] for name in kept}


def _absolute(path: str) -> Path:
    return Path(path).expanduser().absolute()
