"""`nanochat-jax train`: a model from settings, and a sample of its text."""

import contextlib
import dataclasses
import functools
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from nanochat_jax.commands import messages
from nanochat_jax.commands.shared import (
    Flags,
    say,
    say_derived,
    settings_of,
    usage_errors,
)
from nanochat_jax.commands.stored_settings import AUTO, resumed_folder
from nanochat_jax.config import Config, schema
from nanochat_jax.lm.checkpoints import Checkpoints, open_source
from nanochat_jax.lm.planning import memory_limit, run_memory
from nanochat_jax.lm.runtime import machine, processes, require_writable, stopping
from nanochat_jax.lm.tracking import Sink, busy, make_display, make_sinks
from nanochat_jax.lm.training import (
    OptimizerShare,
    Reporter,
    Run,
    Sampler,
    StepProfiler,
    TrainState,
    compile_train_step,
    fit,
    init_state,
    make_run,
    make_sampler,
    parse_steps,
    read_out,
    resume,
)
from nanochat_jax.optimizer import planned_bytes


@dataclasses.dataclass(frozen=True)
class TrainFlags(Flags):
    """Flags of `train` besides the settings.

    Attributes:
      epochs: Passes over the data, in place of `total_steps`.
      checkpoint_dir: Folder for checkpoints and `metrics.jsonl`. If not given, the
        folder of `resume`; without both nothing is written.
      resume: Checkpoint folder, or the folder of one step, to go on from, with the
        settings that are stored there; "auto" goes on if there is a checkpoint in
        `checkpoint_dir`, and starts if there is none.
      allow_codec_change: Whether the resumed state may change its codecs: it is then
        decoded and encoded anew.
      allow_data_change: Whether the resumed run may go on with other data.
      allow_tokenizer_change: Whether it may go on with another tokenizer, whose ids
        must have the same meaning.
      tensorboard: Whether to write metrics to the folder `tensorboard` too.
      wandb: Project of Weights & Biases to log metrics to; offline, unless `WANDB_MODE`
        is `online`.
      profile_steps: Steps to trace, to the folder `profile`: `A:B` for the steps from A
        up to, and without, B.
      coordinator: Address of process 0, `HOST:PORT`, for one of several processes that
        train together. SLURM and Open MPI give it without this flag.
      num_processes: Number of these processes.
      process_id: Number of this process, from 0.
    """

    epochs: int | None = None
    checkpoint_dir: str | None = None
    resume: str | None = None
    allow_codec_change: bool = False
    allow_data_change: bool = False
    allow_tokenizer_change: bool = False
    tensorboard: bool = False
    wandb: str | None = None
    profile_steps: str | None = None
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


class _Job(NamedTuple):
    """A run and its surroundings, before anything is compiled.

    Attributes:
      run: Run to train.
      resumption: Checkpoint to go on from, if any.
      folder: Folder to write to, if any.
      sinks: Sinks of metrics.
      profiler: Profiler of some steps, if any.
      sampler: Generator of text samples, if any.
    """

    run: Run
    resumption: resume.Resumption | None
    folder: Path | None
    sinks: list[Sink]
    profiler: StepProfiler | None
    sampler: Sampler | None

    @property
    def first(self) -> int:
        """Steps done before."""
        return self.resumption.step if self.resumption else 0


# The flags come last among the bases, so that `--help` shows them first.
@dataclasses.dataclass(frozen=True)
class Train(Config, TrainFlags):
    """Trains a GPT; every setting of the TOML file is also a flag.

    SIGTERM and Ctrl-C stop the run after the current step, with a checkpoint; the exit
    codes are 0 and 130. A second signal stops it at once.
    """

    def run(self) -> None:
        """Trains, prints the progress, and ends with a sample and a chart."""
        with contextlib.ExitStack() as stack:
            with usage_errors():
                who = (self.coordinator, self.num_processes, self.process_id)
                stack.enter_context(processes.joined(*who))
                machine.use_device(self.device, self.threads)
            received = self._train(Console(quiet=not processes.is_first()))
        if received:
            sys.exit(0 if received == signal.SIGTERM else 128 + received)

    def how_to_go_on(self) -> str:
        """Returns what is saved of a run that Ctrl-C ended at once, and what to do."""
        if self.resume is not None:  # what its flags change need not be saved yet
            return "Give the same command again: it goes on from what is saved."
        total = self.total_steps if self.epochs is None else sys.maxsize
        return messages.how_to_go_on(self._folder, self._unstored, total)

    @property
    def _folder(self) -> Path | None:
        """Folder of the checkpoints that are written."""
        if self.checkpoint_dir is not None:
            return Path(self.checkpoint_dir)
        return None if self.resume is None else Checkpoints(self.resume).directory

    @property
    def _unstored(self) -> list[object]:
        """Flags that the checkpoint of a run does not store."""
        flags: list[object] = []
        for name in ("device", "threads", "wandb"):
            if (value := getattr(self, name)) not in ("auto", None):
                flags += [f"--{name}", value]
        return flags + ["--tensorboard"] * self.tensorboard

    def _train(self, console: Console) -> signal.Signals | None:
        """Trains; returns the signal that ended it early, if one did."""
        tell = functools.partial(messages.tell, console)
        with usage_errors():
            job = self._prepare()
        say_derived(console, self)
        first, total = job.first, job.run.config.total_steps
        if first == total:
            tell(f"All {total} steps of this run are done already.\n")
            self._end(job, console)
            return None
        messages.describe(job.run, tell)
        state, metrics, received = _fit(job, console, tell)
        if received:
            step = int(state.step)
            tell(messages.stopped(received, step, job.folder, self._unstored))
            return received
        tell(f"\n{messages.done(metrics, first)}\n{messages.held(job.run, state)}\n")
        if job.sampler:
            text = job.sampler(read_out(job.run)(state), int(state.step))
            say(console, f"A sample:\n{text}\n")
        self._end(job, console)
        return None

    def _end(self, job: _Job, console: Console) -> None:
        """Prints the chart of a run that is done, and commands to use its model."""
        if job.folder and processes.is_first():
            messages.chart_of(job.run, job.folder, console)
        known = job.run.corpus.tokenizer is not None
        steps = job.run.config.total_steps
        say(console, messages.saved(job.folder, steps, with_tokenizer=known))

    def _prepare(self) -> _Job:
        """Loads data and refuses invalid settings; no weights are read yet."""
        config, start, resumed = settings_of(self), None, None
        source = resumed_folder(self.resume, self.checkpoint_dir)
        if config.init_from and not source:
            start = open_source(config.init_from)
        run = make_run(config, self.epochs, start)
        allow: list[resume.Change] = [
            change
            for change in resume.CHANGES
            if getattr(self, f"allow_{change}_change")
        ]
        if source:
            resumed = resume.check(run, Checkpoints(source), allow=allow)
        folder = self._folder
        profiler = None
        if self.profile_steps:
            steps = parse_steps(self.profile_steps)
            profiler = StepProfiler(*steps, self._beside(folder) / "profile")
        if self.tensorboard or self.wandb:
            self._beside(folder)
        logs = {"tensorboard": self.tensorboard, "wandb": self.wandb}
        sinks, sampler = make_sinks(folder, run.config, **logs), make_sampler(run)
        self._check(run.config.total_steps, resumed.step if resumed else 0)
        if not processes.is_first():
            sinks, profiler = [], None
        if jax.process_count() > 1:
            sampler = None  # its tokens are on one process, parameters on all
        return _Job(run, resumed, folder, sinks, profiler, sampler)

    def _check(self, total: int, first: int) -> None:
        """Refuses a run without steps, or with later checkpoints, before it writes."""
        done = first == total and self.resume == AUTO
        schema.require(
            (
                first < total or done,
                f"the checkpoint is of step {first}, and the run has {total} steps: "
                "there is nothing left to train. Raise `--total-steps`.",
            )
        )
        if folder := self._folder:
            Checkpoints(folder).check_start(first)
            require_writable(folders=[folder])

    def _beside(self, folder: Path | None) -> Path:
        if folder is None:
            raise ValueError(
                "`--tensorboard`, `--wandb` and `--profile-steps` write beside the "
                "checkpoints. Give a folder by `--checkpoint-dir`."
            )
        return folder


def _fit(
    job: _Job, console: Console, tell: Callable[[str], object]
) -> tuple[TrainState, Mapping[str, Any], signal.Signals | None]:
    """Trains; returns state, last metrics, and the signal that ended it, if any."""
    run, config = job.run, job.run.config
    started = time.perf_counter()
    with busy(console, "Compiling the training step"):
        step = compile_train_step(run)
        processes.meet("compiled")
    tell(messages.compiled(step, time.perf_counter() - started))
    with usage_errors():
        memory_limit.check(config, planned_bytes(step)["peak_bytes"])
        state = job.resumption.restore(tell) if job.resumption else init_state(run)
    # What compiling and the first state have freed would be kept beside every step.
    jax.block_until_ready(state)
    run_memory.give_back_memory()
    first = job.first
    if first:
        tell(f"Resumed from step {first}.")
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stopping(run.mesh))
        checkpoints = None
        if job.folder:
            checkpoints = Checkpoints(
                job.folder,
                keep_last=config.keep_last_checkpoints,
                keep_every=config.keep_checkpoint_every,
            )
            stack.enter_context(checkpoints)
        for sink in job.sinks:
            stack.callback(sink.close)
            sink.resume(first or -1)
        if job.profiler:
            stack.callback(job.profiler.close)
        display = stack.enter_context(
            make_display(config.total_steps, start_step=first, console=console)
        )
        share = None
        if config.measure_optimizer and config.update_in_backward:
            tell("The optimizer's share is not measured: it works within the passes.")
        elif config.measure_optimizer:
            share = OptimizerShare(run)
        state = fit(
            run,
            state,
            step,
            Reporter(run, first, display, job.sinks, job.sampler, share),
            checkpoints=checkpoints,
            profiler=job.profiler,
            stop=stop,
        )
    return state, display.latest, stop.received
