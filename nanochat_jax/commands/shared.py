"""Flags, output and errors that commands have in common."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from nanochat_jax.config import (
    Config,
    ModelConfig,
    ModelName,
    depth,
    derived_from,
    presets,
    schema,
)
from nanochat_jax.lm.checkpoints import Checkpoints, open_source, record


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of commands that take all settings of a run.

    Attributes:
      config_file: TOML file with settings. Flags override it.
      depth: Layers; width, heads, batch and learning rates follow from it where neither
        the file nor a flag gives them.
      model: Known model that gives the shape where neither the file nor a flag does,
        with one sequence per microbatch for each part into which `mesh` divides it.
      device: Device to compute on. `gpu` without a GPU is an error.
      threads: Processors to use on the CPU; all if not given.
    """

    config_file: str | None = None
    depth: int | None = None
    model: ModelName | None = None
    device: Literal["auto", "cpu", "gpu"] = "auto"
    threads: int | None = None


def settings_of(command: Config) -> Config:
    """Returns the settings among the flags of a command."""
    names = [field.name for field in dataclasses.fields(Config)]
    return Config(**{name: getattr(command, name) for name in names})


def derived_settings(
    values: Mapping[str, Any], resumed: str | None = None
) -> dict[str, Any]:
    """Returns the settings that follow from others, where they are not given.

    They are those of `derived_from`, and of the model that a run starts from. A run
    that goes on takes those from its checkpoint, and does not read the model again.

    Args:
      values: Values of a run by key.
      resumed: Checkpoint folder that the run goes on from, if it does.

    Raises:
      ValueError: If `init_from` is given with another source of the model's shape, or
        its model is not there.
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
    if resumed is not None:
        return {**_settings_of_resumed(resumed, first), **derived}
    if first is None:
        return derived
    return {**open_source(first).settings, **derived}


def _settings_of_resumed(folder: str, first: str | None) -> dict[str, Any]:
    """Returns the settings that the run of a checkpoint took from a model."""
    checkpoints = Checkpoints(folder)
    if checkpoints.latest_step() is None:
        return {}  # it is refused later, by name
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
    if was is None:
        return {}
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    kept = (*names, "tokenizer", "end_token", "init_from")
    return {name: stored[name] for name in kept}


def _absolute(path: str) -> Path:
    return Path(path).expanduser().absolute()


def say_derived(console: Console, command: Any) -> None:
    """Prints the settings derived from `--depth` or `--model`, if given.

    Args:
      console: Console to print to.
      command: Command with these flags.
    """
    if command.depth is not None:
        say(console, depth.describe(command.depth, command) + "\n")
    if command.model is not None:
        say(console, presets.describe(command.model, command) + "\n")


def say(console: Console, text: str = "") -> None:
    """Prints a text unchanged: no markup, no highlights, no added line breaks.

    Args:
      console: Console to print to.
      text: Text to print.
    """
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Ends with one message and exit code 2 on invalid settings or data."""
    try:
        yield
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
