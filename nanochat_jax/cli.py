"""The command line, `nanochat-jax COMMAND`.

Exit codes: 0 done, 2 bad usage, settings or data, 130 training that Ctrl-C stopped, 1
anything else.
"""

import argparse
import contextlib
import inspect
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from nanochat_jax.commands import tables
from nanochat_jax.commands.compare import Compare
from nanochat_jax.commands.doctor import Doctor
from nanochat_jax.commands.export import Export
from nanochat_jax.commands.generate import Generate
from nanochat_jax.commands.plan import Plan
from nanochat_jax.commands.plot import Plot
from nanochat_jax.commands.prepare_data import PrepareData
from nanochat_jax.commands.shared import usage_errors
from nanochat_jax.commands.train import Train

# Flags on which hangs what is not set, and how they are read.
_DECIDING = {"depth": int, "model": str, "fallback": str, "mesh": tables.parse_table}

Command = Train | Plan | Compare | Plot | PrepareData | Generate | Export | Doctor


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      args: Arguments; those of the process if not given.

    Returns:
      The exit code.
    """
    warnings.showwarning = _show_warning
    try:
        with usage_errors():
            command = _parse(sys.argv[1:] if args is None else args)
        command.run()
    except BrokenPipeError:  # whoever read the output, as `head` does, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (FloatingPointError, KeyboardInterrupt, OSError) as error:
        print(f"error: {error or 'interrupted'}", file=sys.stderr)
        return 1
    return 0


def _parse(args: Sequence[str]) -> Command:
    """Returns the command; flags come before the file, both before depth and model."""
    file, flags = _before(args)
    train, plan, compare = (
        # The type checker does not see that these keep the class.
        kind.from_toml(file, **flags) if file else kind.from_values(flags, "flags")
        for kind in (Train, Plan, Compare)
    )
    return tyro.cli(
        Annotated[Train, _named("train", Train, default=train)]
        | Annotated[Plan, _named("plan", Plan, default=plan)]
        | Annotated[Compare, _named("compare", Compare, default=compare)]
        | Annotated[Plot, _named("plot", Plot)]
        | Annotated[PrepareData, _named("prepare-data", PrepareData)]
        | Annotated[Generate, _named("generate", Generate)]
        | Annotated[Export, _named("export", Export)]
        | Annotated[Doctor, _named("doctor", Doctor)],
        args=args,
        prog="nanochat-jax",
        description="Trains GPTs with Muon, 8-bit momentum and GaLore.",
        registry=tables.REGISTRY,
    )


def _named(name: str, command: type, **kwargs: Any) -> Any:
    """Returns what makes a subcommand of a class, described in a line."""
    line = (inspect.getdoc(command) or "").partition("\n")[0]
    return tyro.conf.subcommand(name, description=line, **kwargs)


def _before(args: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """Returns the file of settings, and the flags that decide what is not in it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config-file", *_DECIDING):
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", dest=name)
    given = vars(parser.parse_known_args(args)[0])
    flags = {key: given[key] for key in _DECIDING if given[key] is not None}
    for key, read in _DECIDING.items():
        # What cannot be read is refused by what it is given to.
        with contextlib.suppress(KeyError, ValueError):
            flags[key] = read(flags[key])
    return given["config-file"], flags


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
