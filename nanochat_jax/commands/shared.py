"""What the commands share: their settings, how they print, how they refuse."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any, Literal

from rich.console import Console

from nanochat_jax.config import Config, ModelName, depth, presets


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the commands that take all settings of a run.

    Attributes:
      config_file: TOML file with settings. Flags override it.
      depth: Layers, from which width, heads, batch and learning rates follow where
        neither the file nor a flag gives them.
      model: Known model whose shape is taken where neither the file nor a flag gives
        it, with a microbatch of one sequence for each part in which `mesh` divides it.
      device: Where to compute. `gpu` without a GPU is an error.
      threads: Processors to use on the CPU; all if not given.
    """

    config_file: str | None = None
    depth: int | None = None
    model: ModelName | None = None
    device: Literal["auto", "cpu", "gpu"] = "auto"
    threads: int | None = None


def settings_of(command: Config) -> Config:
    """Returns the settings of a command without its own flags."""
    names = [field.name for field in dataclasses.fields(Config)]
    return Config(**{name: getattr(command, name) for name in names})


def say_derived(console: Console, command: Any) -> None:
    """Prints what follows from the depth or the model of a command, if it has one."""
    if command.depth is not None:
        say(console, depth.describe(command.depth, command) + "\n")
    if command.model is not None:
        say(console, presets.describe(command.model, command) + "\n")


def say(console: Console, text: str = "") -> None:
    """Prints a text as it is: no markup, no highlights, no line breaks of our own."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Ends with one message and exit code 2 on settings or data that do not do."""
    try:
        yield
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
