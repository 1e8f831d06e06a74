"""The command line, `nanochat-jax COMMAND`.

Exit codes: 0 done, 2 bad usage, settings or data, 130 training that Ctrl-C stopped, 1
anything else.
"""

import argparse
import contextlib
import functools
import logging
import operator
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from rich.console import Console

from nanochat_jax.commands import (
    Compare,
    Doctor,
    Export,
    Generate,
    Plan,
    Plot,
    PrepareData,
    Train,
    help,
    tables,
    usage_errors,
)

# Flags from which defaults of others are derived, and their types.
_DECIDING = {"depth": int, "model": str, "fallback": str, "mesh": tables.parse_table}

COMMANDS = {
    "train": Train,
    "plan": Plan,
    "compare": Compare,
    "plot": Plot,
    "prepare-data": PrepareData,
    "generate": Generate,
    "export": Export,
    "doctor": Doctor,
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      args: Arguments; those of the process if not given.

    Returns:
      The exit code.
    """
    warnings.showwarning = _show_warning
    # Orbax logs some forty lines per save through absl, which bury the display.
    logging.getLogger("absl").setLevel(logging.WARNING)
    # LAPACK's threads spin while they wait, and take cores from XLA's: with them a
    # refresh of GaLore's basis takes up to 1.6 times as long.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    args = sys.argv[1:] if args is None else args
    try:
        with usage_errors():
            if set(help.FLAGS) & set(args):
                _show_help(args)
                return 0
            command = _parse(args)
        command.run()
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (FloatingPointError, KeyboardInterrupt, OSError) as error:
        print(f"error: {error or 'interrupted'}", file=sys.stderr)
        return 1
    return 0


def _defaults(args: Sequence[str]) -> dict[str, Any]:
    """Returns the default settings of commands, by name.

    Flags override the file, and both override `--depth` and `--model`.
    """
    file, flags = _before(args)
    names = [name for name in ("train", "plan", "compare") if name in args]
    return {
        name: COMMANDS[name].from_toml(file, **flags)
        if file
        else COMMANDS[name].from_values(flags, "flags")
        for name in names
    }


def _parse(args: Sequence[str]) -> Any:
    """Returns the command with its flags."""
    kinds, defaults = [], _defaults(args)
    for name, kind in COMMANDS.items():
        given = {"default": defaults[name]} if name in defaults else {}
        kinds.append(Annotated[kind, tyro.conf.subcommand(name, **given)])
    return tyro.cli(
        functools.reduce(operator.or_, kinds),
        args=args,
        prog="nanochat-jax",
        registry=tables.REGISTRY,
    )


def _show_help(args: Sequence[str]) -> None:
    """Prints the help of a command, or the list of commands."""
    console = Console()
    name = next((arg for arg in args if arg in COMMANDS), None)
    if name is None:
        help.show_commands(console, COMMANDS)
        return
    full, default = "--help-all" in args, _defaults(args).get(name)
    help.show_command(console, name, COMMANDS[name], default, full=full)


def _before(args: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """Returns the file of settings, and the flags that derive defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config-file", *_DECIDING):
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", dest=name)
    backward = ("--update-in-backward", "--update_in_backward")
    parser.add_argument(*backward, dest="update_in_backward", action="store_true")
    given = vars(parser.parse_known_args(args)[0])
    flags = {key: given[key] for key in _DECIDING if given[key] is not None}
    for key, read in _DECIDING.items():
        # A value that cannot be read is refused later, with a message.
        with contextlib.suppress(KeyError, ValueError):
            flags[key] = read(flags[key])
    if given["update_in_backward"]:
        flags["update_in_backward"] = True
    return given["config-file"], flags


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
