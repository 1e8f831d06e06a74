"""Flags, output and errors that commands have in common."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from rich.console import Console

from nanochat_jax.commands.usage import ending
from nanochat_jax.config import Config, ModelName, depth, presets


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
        ending.fail(str(error))
