"""The command line, `nanochat-jax COMMAND`.

Exit codes: 0 done, 2 bad usage, settings or data, 130 training that Ctrl-C stopped, 1
anything else.
"""

import argparse
import contextlib
import functools
import itertools
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
    Import,
    Plan,
    Plot,
    PrepareData,
    Train,
    derived_settings,
    help,
    tables,
    usage_errors,
)

# Flags from which defaults of others are derived, and their types.
_DECIDING = {
    "depth": int,
    "model": str,
    "fallback": str,
    "mesh": tables.parse_table,
    "init_from": str,
}

# Flags of several values that may also be given several times.
_REPEATED = ("--data-path", "--freeze")

COMMANDS = {
    "train": Train,
    "plan": Plan,
    "compare": Compare,
    "plot": Plot,
    "prepare-data": PrepareData,
    "generate": Generate,
    "import": Import,
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

    Flags override the file, and both override `--depth`, `--model` and the model to
    start from.
    """
    file, flags, resumed = _before(args)
    derive = functools.partial(derived_settings, resumed=resumed)
    names = [name for name in ("train", "plan", "compare") if name in args]
    return {
        name: COMMANDS[name].from_toml(file, derive=derive, **flags)
        if file
        else COMMANDS[name].from_values(flags, "flags", derive)
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
        args=_gathered(args),
        prog="nanochat-jax",
        registry=tables.REGISTRY,
    )


def _gathered(args: Sequence[str]) -> list[str]:
    """Returns arguments with the values of each repeated flag behind one of them.

    tyro takes several values behind a flag, but of a repeated flag only the last.
    """
    values: dict[str, list[str]] = {flag: [] for flag in _REPEATED}
    others: list[str] = []
    into = others
    for arg in args:
        flag, given, value = arg.partition("=")
        if not arg.startswith("-"):
            into.append(arg)
            continue
        into = values.get(flag.replace("_", "-"), others)
        if into is others:
            others.append(arg)
        elif given:
            into.append(value)
    found = [[flag, *paths] for flag, paths in values.items() if paths]
    return [*others, *itertools.chain.from_iterable(found)]


def _show_help(args: Sequence[str]) -> None:
    """Prints the help of a command, or the list of commands."""
    console = Console()
    name = next((arg for arg in args if arg in COMMANDS), None)
    if name is None:
        help.show_commands(console, COMMANDS)
        return
    full, default = "--help-all" in args, _defaults(args).get(name)
    help.show_command(console, name, COMMANDS[name], default, full=full)


def _before(
    args: Sequence[str],
) -> tuple[str | None, dict[str, Any], str | None]:
    """Returns the file of settings, flags that derive defaults, and `--resume`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config_file", "resume", *_DECIDING):
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", dest=name)
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
    return given["config_file"], flags, given["resume"]


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
