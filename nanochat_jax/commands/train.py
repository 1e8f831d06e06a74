"""`nanochat-jax train`: from settings to a trained model and a sample of its text."""

import contextlib
import dataclasses
import functools
import time
from pathlib import Path

import jax
from rich.console import Console

from nanochat_jax.commands.shared import (
    Flags,
    say,
    say_depth,
    settings_of,
    usage_errors,
)
from nanochat_jax.config import Config
from nanochat_jax.lm import device, report, setup, trainer
from nanochat_jax.lm.checkpoint import Checkpoints
from nanochat_jax.lm.display import make_display
from nanochat_jax.lm.generate import generate
from nanochat_jax.lm.metrics import MetricsWriter
from nanochat_jax.memory import memory_report


@dataclasses.dataclass(frozen=True)
class TrainFlags(Flags):
    """Flags of `train` besides the settings.

    Attributes:
      epochs: Times to go through the data, in place of `total_steps`.
      checkpoint_dir: Folder for checkpoints and `metrics.jsonl`; with `resume` its
        folder if not given, else nothing is written.
      resume: Checkpoint folder, or the folder of one step, to go on from.
      allow_codec_change: Whether the resumed state may be stored with other codecs, or
        none, than it was: it is then decoded and stored anew.
    """

    epochs: int | None = None
    checkpoint_dir: str | None = None
    resume: str | None = None
    allow_codec_change: bool = False


# The flags come last among the bases, so that `--help` shows them first.
@dataclasses.dataclass(frozen=True)
class Train(Config, TrainFlags):
    """Trains a GPT; every setting of the TOML file is also a flag."""

    def run(self) -> None:
        """Trains, prints what it does, and ends with a sample of text."""
        console = Console()
        tell = functools.partial(say, console)
        with usage_errors():
            device.use(self.device, self.threads)
            run = setup.prepare(settings_of(self), self.epochs)
            source = Checkpoints(self.resume) if self.resume else None
            restored = source and trainer.restore(
                run, source, allow_codec_change=self.allow_codec_change, say=tell
            )
            folder = self.checkpoint_dir or (source and source.directory)
            first = int(restored.step) if restored else 0
            _check_folder(folder, first, run.config.total_steps)
        say_depth(console, self)
        tell(report.optimizer_summary(run.config, memory_report(run.tx, run.params)))
        tell()
        tell(f"Data:   {run.corpus.description}, {len(run.corpus.train):,} tokens")
        tell(f"Model:  {_count(run.params):,} parameters on {device.describe()}")
        started = time.perf_counter()
        step = trainer.compile_train_step(run)
        low_rank_step = trainer.compile_low_rank_step(run)
        tell(_compiled(step, time.perf_counter() - started))
        state = restored or trainer.init_state(run)
        if restored:
            tell(f"Resumed from step {first} of {self.resume}.")
        state = _fit(run, state, (step, low_rank_step), folder, console)
        held = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
        baseline = memory_report(run.tx, run.params).fp32_muon_adamw_bytes
        tell(
            f"\nOptimizer state: {report.megabytes(held)}; "
            f"FP32 Muon + AdamW: {report.megabytes(baseline)}."
        )
        _print_sample(run, state, console)


def _check_folder(folder: str | Path | None, first: int, total: int) -> None:
    """Refuses, before anything is written, a run that could not be saved."""
    if folder:
        Checkpoints(folder).check_start(first)
    if first >= total:
        raise ValueError(
            f"the checkpoint is of step {first}, and the run has {total} steps: there "
            "is nothing left to train. Raise `--total-steps`."
        )


def _fit(
    run: setup.Run,
    state: trainer.TrainState,
    steps: tuple[jax.stages.Compiled, jax.stages.Compiled | None],
    folder: str | Path | None,
    console: Console,
) -> trainer.TrainState:
    """Trains, with checkpoints and metrics if there is a folder for them."""
    config, first = run.config, int(state.step)
    with contextlib.ExitStack() as stack:
        checkpoints = metrics = None
        if folder:
            keep = config.keep_last_checkpoints
            checkpoints = stack.enter_context(Checkpoints(folder, keep_last=keep))
            metrics = stack.enter_context(MetricsWriter(Path(folder) / "metrics.jsonl"))
            metrics.resume(first or -1)
        display = stack.enter_context(
            make_display(config.total_steps, start_step=first, console=console)
        )
        return trainer.fit(
            run,
            state,
            steps[0],
            low_rank_step=steps[1],
            display=display,
            metrics=metrics,
            checkpoints=checkpoints,
        )


def _print_sample(run: setup.Run, state: trainer.TrainState, console: Console) -> None:
    """Prints text the model continues, if its ids are known to be of the tokenizer."""
    config = run.config
    known = run.corpus.tokenizer == run.tokenizer.fingerprint
    if not known or not config.sample_tokens:
        return
    prompt = run.tokenizer.encode(config.sample_prompt).tolist()
    tokens = generate(
        run.graphdef,
        state.params,
        config,
        prompt,
        max_tokens=min(config.sample_tokens, config.max_seq_len - len(prompt)),
        temperature=0.8,
        seed=config.seed,
        stop=[run.tokenizer.separator],
    )
    text = run.tokenizer.decode([*prompt, *tokens])
    say(console, f"\nA sample:\n{text}")


def _compiled(step: jax.stages.Compiled, seconds: float) -> str:
    line = f"Compiled the training step in {seconds:.1f} s"
    planned = step.memory_analysis()
    if planned is None:
        return line
    peak = planned.argument_size_in_bytes + planned.temp_size_in_bytes
    return f"{line}; it plans {report.megabytes(peak)} with parameters and state."


def _count(params: object) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
