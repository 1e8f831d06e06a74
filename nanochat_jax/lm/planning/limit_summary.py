"""Text and a table about steps and a memory limit."""

import json
import textwrap
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from nanochat_jax.config import Config
from nanochat_jax.lm.planning.memory_limit import Search
from nanochat_jax.lm.planning.optimizer_summary import megabytes


def limit_table(found: Search) -> Table:
    """Returns the steps that were compiled as a table.

    Args:
      found: The search for a step within a limit.
    """
    table = Table(title="Steps by cost", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("settings to change")
    table.add_column("planned peak", justify="right")
    table.add_column("fits")
    for trial in found.trials:
        lines = toml_lines(trial.settings) or ["none"]
        fits = "yes" if trial.fits else "no"
        table.add_row(", ".join(lines), megabytes(trial.peak_bytes), fits)
    return table


def limit_summary(config: Config, found: Search, init_bytes: int = 0) -> str:
    """Returns in words whether a step fits, and what to change.

    Args:
      config: Settings of the run.
      found: The search for a step within its limit.
      init_bytes: Peak while the initial state is made.
    """
    asked, first = f"`memory_limit` {config.memory_limit}", found.trials[0]
    if first.fits:
        spare = megabytes(found.limit - first.peak_bytes)
        said = f"{asked}: the step fits, with {spare} to spare."
        if init_bytes <= found.limit:
            return said
        return (
            f"{said}\nMaking the initial state, at {megabytes(init_bytes)}, does not."
        )
    over = megabytes(first.peak_bytes - found.limit)
    lines = [f"{asked}: the step takes {over} too much."]
    best = found.fitting or found.least
    if not best.fits:
        over = megabytes(best.peak_bytes - found.limit)
        return "\n".join(
            [
                *lines,
                "None of the settings tried fit. With those of the lowest peak, "
                f"{megabytes(best.peak_bytes)},",
                f"it takes {over} too much: make the model, `seq_len` or the batch "
                "smaller.",
            ]
        )
    lines += [
        "The cheapest settings tried that fit, as flags and as lines of a TOML file:",
        textwrap.indent(_wrapped(flags(best.settings)), "  "),
        *(f"  {line}" for line in toml_lines(best.settings)),
    ]
    if "update_in_backward" in best.settings and config.grad_clip:
        lines.append(
            "`update_in_backward` clips the gradient of each layer by itself, at "
            f"{config.grad_clip:g}."
        )
    return "\n".join(lines)


def toml_lines(settings: dict[str, Any]) -> list[str]:
    """Returns settings as lines of a TOML file.

    Example:
      >>> toml_lines({"use_8bit_optim": True, "param_dtype": "bfloat16"})
      ['use_8bit_optim = true', 'param_dtype = "bfloat16"']

    Args:
      settings: Values by key: booleans, numbers and text.
    """
    return [f"{key} = {json.dumps(value)}" for key, value in settings.items()]


def flags(settings: dict[str, Any]) -> list[str]:
    """Returns settings as flags of the commands.

    Example:
      >>> flags({"use_8bit_optim": True, "remat": False, "param_dtype": "bfloat16"})
      ['--use-8bit-optim', '--no-remat', '--param-dtype bfloat16']

    Args:
      settings: Values by key: booleans, numbers and text.
    """
    names = {key: key.replace("_", "-") for key in settings}
    return [
        f"--{'' if value else 'no-'}{names[key]}"
        if isinstance(value, bool)
        else f"--{names[key]} {value}"
        for key, value in settings.items()
    ]


def _wrapped(words: list[str]) -> str:
    return textwrap.fill(
        " ".join(words), 78, break_on_hyphens=False, break_long_words=False
    )
