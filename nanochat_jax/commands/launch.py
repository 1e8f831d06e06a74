"""From the words of a command line to a command that runs."""

import ctypes
import functools
import importlib.metadata
import logging
import os
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from nanochat_jax.commands.usage import ctrl_c, ending, help, parsing, registry
from nanochat_jax.config import derived_from

_PACKAGE = str(Path(__file__).parents[1])
_HELP = "Help: nanochat-jax --help"


def run(args: Sequence[str]) -> int:
    """Runs a command.

    Args:
      args: Words behind `nanochat-jax`.

    Returns:
      The exit code.
    """
    command = None
    bound_arenas()
    with ctrl_c.heard(lambda: ending.interrupted(command, amid=True)) as pressed:
        try:
            command = command_of(args)
            if command is not None:
                command.run()
        except BrokenPipeError:  # the reader of the output has closed it, as `head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt:
            return ending.interrupted(command)
        except Exception as error:
            # Some packages turn an interrupt into an error of their own.
            if pressed.is_set():
                return ending.interrupted(command)
            if not isinstance(error, OSError | FloatingPointError):
                raise
            system = isinstance(error, OSError)
            ending.say("error", ending.of_system(error) if system else str(error))
            return 1
    return 0


def command_of(args: Sequence[str]) -> Any:
    """Returns the command of a command line, or prints what it asks for.

    Args:
      args: Words behind `nanochat-jax`.

    Returns:
      The command, ready to run; `None` after printing help or versions.

    Raises:
      SystemExit: If the words or the file of settings are wrong.
    """
    _quieten()
    if {"--version", "-V"} & set(args[:1]):
        print(_versions())
        return None
    if set(help.FLAGS) & set(args):
        _show_help(args)
        return None
    name, kind = _named(args)
    parsed = parsing.parse(kind, args[1:])
    command, errors = _build(kind, parsed)
    if errors:
        ending.fail("\n".join([*errors, f"Flags: nanochat-jax {name} --help"]))
    return command


def _named(args: Sequence[str]) -> tuple[str, Any]:
    """Returns the name and the class of the command, which comes first."""
    name = args[0] if args else ""
    if name not in registry.COMMANDS:
        ending.fail(f"{_without_command(args)}\n{_HELP}")
    return name, registry.COMMANDS[name].load()


def _without_command(args: Sequence[str]) -> str:
    """Returns a message about words that do not begin with a command."""
    if not args:
        return f"a command is required: {', '.join(registry.COMMANDS)}."
    later = [arg for arg in args if arg in registry.COMMANDS]
    if later:
        return f"the command comes first: nanochat-jax {later[0]} {args[0]} ..."
    if args[0].startswith("-"):
        names = ", ".join(registry.COMMANDS)
        return f"a command is required before `{args[0]}`: {names}."
    return registry.unknown(args[0])


def _build(kind: Any, parsed: parsing.Parsed) -> tuple[Any, list[str]]:
    """Returns a command, and what is wrong with its flags and its file."""
    values, errors = parsed
    try:
        command = None
        if not hasattr(kind, "from_toml"):
            return (None if errors else kind(**values)), errors
        file = values.get("config_file")
        derive = functools.partial(_derived, given=values)
        if file:
            command = kind.from_toml(file, derive=derive, **values)
        else:
            command = kind.from_values(values, "flags", derive)
    except ValueError as error:
        lines = str(error).splitlines()
        return None, [*errors, *(_without_source(line, values) for line in lines)]
    return command, errors


def _derived(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that follow from others, or from a model or checkpoint."""
    resumed = given.get("resume")
    if resumed is None and values.get("init_from") is None:
        return derived_from(values)
    # Models and checkpoints need JAX, the rest does not.
    from nanochat_jax.commands.stored_settings import derived_settings

    return derived_settings(
        values,
        resumed=resumed,
        checkpoint_dir=given.get("checkpoint_dir"),
        config_file=given.get("config_file"),
    )


def _without_source(line: str, flags: Mapping[str, Any]) -> str:
    """Returns a line about a setting without the file, if a flag gave the setting."""
    for source in ("flags", str(flags.get("config_file"))):
        said = line.removeprefix(f"{source}: ")
        by_flag = said.startswith("`") and said.split("`")[1] in flags
        if said != line and (by_flag or source == "flags"):
            return said
    return line


def _show_help(args: Sequence[str]) -> None:
    """Prints the help of a command, or the list of commands."""
    console = Console()
    name = next((arg for arg in args if arg in registry.COMMANDS), None)
    if name is None:
        words = [arg for arg in args if not arg.startswith("-")]
        if words:
            ending.fail(f"{registry.unknown(words[0])}\n{_HELP}")
        known = registry.COMMANDS.items()
        help.show_commands(console, {name: command.summary for name, command in known})
        return
    kind, default = registry.COMMANDS[name].load(), None
    if hasattr(kind, "from_toml"):
        words = [arg for arg in args if arg not in (name, *help.FLAGS)]
        parsed = parsing.parse(kind, words)
        default, errors = _build(kind, parsed._replace(errors=[]))
        if errors:
            ending.fail("\n".join(errors))
    help.show_command(console, name, kind, default, full="--help-all" in args)


def _versions() -> str:
    """Returns the versions of this package, JAX and Python."""
    found = []
    for name in ("nanochat-jax", "jax"):
        try:
            found.append(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            found.append("not installed")
    ours, jax = found
    return f"nanochat-jax {ours} (jax {jax}, Python {platform.python_version()})"


def _quieten() -> None:
    """Keeps what other packages print from burying what a command prints."""
    warnings.showwarning = _show_warning
    # Orbax logs some forty lines per save through absl, and warns of what the checks
    # of checkpoints say better.
    logging.getLogger("absl").setLevel(logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # LAPACK's threads spin while they wait, and take cores from XLA's: with them a
    # refresh of GaLore's basis takes up to 1.6 times as long.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def bound_arenas() -> None:
    """Lets all threads take memory from one arena of the C library of Linux.

    Each of XLA's threads would keep an arena of its own, with what products of matrices
    have freed: 60 MB at nano_125m, which nothing plans. `MALLOC_ARENA_MAX` goes before.
    """
    set_option = None
    if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ:
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        most_arenas = -8  # M_ARENA_MAX of malloc.h
        set_option(most_arenas, 1)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, *_: object
) -> None:
    """Prints a warning of this package; those of others on demand, `python -W`."""
    if filename.startswith(_PACKAGE) or sys.warnoptions:
        ending.say("warning", str(message))
