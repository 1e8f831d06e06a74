"""What `nanochat-jax train` prints before and after the steps."""

import shlex
import signal
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.tree_util import keystr
from rich.console import Console

from nanochat_jax.commands.shared import say
from nanochat_jax.lm.checkpoints import Checkpoints
from nanochat_jax.lm.model import param_sharding
from nanochat_jax.lm.planning import optimizer_summary
from nanochat_jax.lm.runtime import machine, tree_bytes
from nanochat_jax.lm.tracking import chart, clock, read_metrics
from nanochat_jax.lm.training import Run, TrainState
from nanochat_jax.optimizer import bytes_per_device, memory_report, roles

_HANGING = " " * 8
_PROGRAM = "nanochat-jax"
_NOTHING = "Nothing was saved, for want of `--checkpoint-dir`."


def tell(console: Console, text: str = "") -> None:
    """Prints lines; a terminal gets them broken between words, but for commands.

    Args:
      console: Console to print to.
      text: The lines.
    """
    for line in text.split("\n"):
        if not console.is_terminal or _PROGRAM in line or len(line) <= console.width:
            say(console, line)
            continue
        for part in textwrap.wrap(
            line,
            console.width,
            subsequent_indent=_HANGING,
            break_long_words=False,
            break_on_hyphens=False,
        ):
            say(console, part)


def describe(run: Run, tell: Callable[[str], object]) -> None:
    """Prints optimizer, data and model of a run.

    Args:
      run: The run.
      tell: Function that prints lines.
    """
    report = memory_report(run.tx, run.params)
    tell(f"{optimizer_summary.optimizer_summary(run.config, report)}\n")
    tell(f"Data:   {run.corpus.description}, {len(run.corpus.train):,} tokens")
    count = report.total_params
    tell(f"Model:  {count:,} parameters on {machine.device_names()}")
    if run.config.freeze or any(group.freeze for group in run.config.groups):
        tell(frozen(run))
    if mesh := param_sharding.mesh_summary(run.params, run.config):
        tell(mesh)
    if run.source:
        tell(f"Start:  {run.source.kind} {run.source.path}")


def done(metrics: Mapping[str, Any], first: int) -> str:
    """Returns the summary of a finished run.

    Args:
      metrics: Last metrics of the run.
      first: Steps done before a resumption.
    """
    now = f", the last {metrics['step'] - first:,} steps" if first else ""
    line = (
        f"Done:   {metrics['step']:,} steps, {metrics['tokens']:,} tokens{now} in "
        f"{clock(metrics['elapsed_s'])}\n"
        f"Loss:   {metrics['val_loss']:.4f} on held-out text"
    )
    bits = metrics.get("val_bpb")
    return line if bits is None else f"{line}, {bits:.4f} bits a byte"


def frozen(run: Run) -> str:
    """Returns a line about the parameters that are not trained.

    Args:
      run: The run.
    """
    found = roles.frozen_by(run.config.freeze, run.params, run.config.groups)
    by_group = [group.match for group in run.config.groups if group.freeze]
    sizes = {keystr(path): x.size for path, x in jax.tree.leaves_with_path(run.params)}
    count, total = sum(sizes[name] for name in found), sum(sizes.values())
    return (
        f"Frozen: {count:,} of {total:,} parameters, without gradient and state "
        f"({', '.join([*run.config.freeze, *by_group])})"
    )


def chart_of(run: Run, folder: Path, console: Console) -> None:
    """Prints the losses of a run, and its optimizer state beside those of baselines.

    Args:
      run: The run.
      folder: Folder with its metrics.
      console: Console to print to.
    """
    file = folder / "metrics.jsonl"
    lines = read_metrics(file) if file.exists() else []
    report = memory_report(run.tx, run.params)
    sizes = {
        f"this run, {run.config.variant}": report.total_bytes,
        "Muon + AdamW, float32": report.fp32_muon_adamw_bytes,
        "AdamW, float32": 8 * report.total_params,
    }
    width, ascii_only = min(console.width, 100), console.options.ascii_only
    for text in (
        chart.draw_losses(lines, width, ascii_only=ascii_only),
        chart.draw_bytes(sizes, width, ascii_only=ascii_only),
    ):
        say(console, f"{text}\n")


def saved(folder: Path | None, steps: int, *, with_tokenizer: bool = True) -> str:
    """Returns the folder of the model, and commands to use it.

    Args:
      folder: The folder, if there is one.
      steps: Steps of the run.
      with_tokenizer: Whether the run knows the tokenizer of its ids.
    """
    if folder is None:
        return "Saved:  nothing, for want of `--checkpoint-dir`"
    also = [] if with_tokenizer else ["--tokenizer", "FILE"]
    first, *others = (
        command("generate", "--checkpoint", folder, *also),
        command("plot", folder),
        command("train", "--resume", folder, "--total-steps", 2 * steps),
    )
    lines = [f"Saved:  {folder}", f"Next:   {first}"]
    return "\n".join([*lines, *(f"{_HANGING}{line}" for line in others)])


def stopped(
    received: signal.Signals, step: int, folder: Path | None, flags: Sequence[object]
) -> str:
    """Returns the summary of a run that a signal ended, and how to go on.

    Args:
      received: The signal.
      step: Steps done.
      folder: Folder of the checkpoint, if there is one.
      flags: Flags of the command that no checkpoint stores.
    """
    name = "interrupted" if received == signal.SIGINT else received.name
    line = f"\n{name}: stopped after step {step}"
    if folder is None:
        return f"{line}. {_NOTHING}"
    return f"{line}, which is saved. {_go_on(folder, flags)}"


def how_to_go_on(folder: Path | None, flags: Sequence[object], total: int) -> str:
    """Returns what is saved of a run that ended at once, and how to go on with it.

    Args:
      folder: Folder of its checkpoints, if it has one.
      flags: Flags of the command that no checkpoint stores.
      total: Steps of the run.
    """
    if folder is None:
        return _NOTHING
    step = Checkpoints(folder).latest_step()
    if step is None:
        return "Nothing is saved yet. Start with the same command again."
    if step >= total:
        return f"All {step} steps are done, and saved in {folder}."
    return f"Step {step} is saved. {_go_on(folder, flags)}"


def _go_on(folder: Path, flags: Sequence[object]) -> str:
    return f"Go on with\n  {command('train', '--resume', folder, *flags)}"


def command(*words: object) -> str:
    """Returns a command line of this program, to be typed as it is.

    Args:
      *words: Its words.
    """
    return shlex.join([_PROGRAM, *map(str, words)])


def compiled(step: jax.stages.Compiled, seconds: float) -> str:
    """Returns the compile time, and the planned bytes of the step.

    Args:
      step: The compiled step.
      seconds: Time of its compilation.
    """
    line = f"Step:   compiled in {seconds:.1f} s"
    planned = step.memory_analysis()
    if planned is None:
        return line
    peak = planned.argument_size_in_bytes + planned.temp_size_in_bytes
    return (
        f"{line}, plans {optimizer_summary.megabytes(peak)} with parameters and state"
    )


def held(run: Run, state: TrainState) -> str:
    """Returns the bytes of the optimizer state, beside those of the baseline.

    Args:
      run: The run.
      state: Its state.
    """
    held = tree_bytes(state.opt_state)
    baseline = memory_report(run.tx, run.params).fp32_muon_adamw_bytes
    each = optimizer_summary.megabytes(bytes_per_device(state.opt_state))
    return (
        f"Optimizer state: {optimizer_summary.megabytes(held)}"
        f"{f', {each} on each device' if run.mesh else ''}; "
        f"FP32 Muon + AdamW: {optimizer_summary.megabytes(baseline)}."
    )
