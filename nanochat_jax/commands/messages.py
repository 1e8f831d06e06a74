"""What `nanochat-jax train` prints before and after the steps."""

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.tree_util import keystr

from nanochat_jax.lm.planning import optimizer_summary
from nanochat_jax.lm.runtime import tree_bytes
from nanochat_jax.lm.tracking import clock
from nanochat_jax.lm.training import Run, TrainState
from nanochat_jax.optimizer import bytes_per_device, memory_report, roles


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
    found = roles.frozen_by(run.config.freeze, run.params)
    sizes = {keystr(path): x.size for path, x in jax.tree.leaves_with_path(run.params)}
    count, total = sum(sizes[name] for name in found), sum(sizes.values())
    return (
        f"Frozen: {count:,} of {total:,} parameters, without gradient and state "
        f"({', '.join(run.config.freeze)})"
    )


def saved(folder: Path | None, *, with_tokenizer: bool = True) -> str:
    """Returns the folder of the model, and a command to try it.

    Args:
      folder: The folder, if there is one.
      with_tokenizer: Whether the run knows the tokenizer of its ids.
    """
    if folder is None:
        return "Saved:  nothing, for want of `--checkpoint-dir`"
    also = "" if with_tokenizer else " --tokenizer FILE"
    return f"Saved:  {folder}; try `nanochat-jax generate --checkpoint {folder}{also}`"


def stopped(received: signal.Signals, step: int, folder: Path | None) -> str:
    """Returns the summary of a run that a signal ended, and how to go on.

    Args:
      received: The signal.
      step: Steps done.
      folder: Folder of the checkpoint, if there is one.
    """
    line = f"\n{received.name}: stopped after step {step}"
    if folder is None:
        return f"{line}. Nothing was saved, for want of `--checkpoint-dir`."
    return f"{line}, which is saved. Go on with `--resume {folder}`."


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
