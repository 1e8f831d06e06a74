"""The command line, `nanochat-jax COMMAND`.

Exit codes: 0 done, 2 bad usage, settings or data, 1 anything else.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from rich.console import Console

from nanochat_jax.config import Config
from nanochat_jax.lm import device, report, setup, trainer
from nanochat_jax.lm.checkpoint import Checkpoints
from nanochat_jax.lm.display import make_display
from nanochat_jax.lm.generate import generate
from nanochat_jax.lm.metrics import MetricsWriter
from nanochat_jax.memory import compiled_bytes, memory_report
from nanochat_jax.optimizer import build_optimizer


@dataclasses.dataclass(frozen=True)
class Train(Config):
    """Trains a GPT; every setting of the TOML file is also a flag.

    Attributes:
      config_file: TOML file with settings. Flags override it.
      epochs: Times to go through the data, in place of `total_steps`.
      checkpoint_dir: Folder for checkpoints and `metrics.jsonl`; with `resume` its
        folder if not given, else nothing is written.
      resume: Checkpoint folder, or the folder of one step, to go on from.
      device: Where to compute. `gpu` without a GPU is an error.
      threads: Processors to use on the CPU; all if not given.
    """

    config_file: str | None = None
    epochs: int | None = None
    checkpoint_dir: str | None = None
    resume: str | None = None
    device: Literal["auto", "cpu", "gpu"] = "auto"
    threads: int | None = None

    def run(self) -> None:
        """Trains, prints what it does, and ends with a sample of text."""
        console = Console()
        with _usage_errors():
            device.use(self.device, self.threads)
            run = setup.prepare(_settings(self), self.epochs)
            source = Checkpoints(self.resume) if self.resume else None
            restored = trainer.restore(run, source) if source else None
            folder = self.checkpoint_dir or (source and source.directory)
            first = int(restored.step) if restored else 0
            _check_folder(folder, first, run.config.total_steps)
        say = lambda text="": _say(console, text)
        say(report.optimizer_summary(run.config, memory_report(run.tx, run.params)))
        say()
        say(f"Data:   {run.corpus.description}, {len(run.corpus.train):,} tokens")
        say(f"Model:  {_count(run.params):,} parameters on {device.describe()}")
        started = time.perf_counter()
        step = trainer.compile_train_step(run)
        say(_compiled(step, time.perf_counter() - started))
        state = restored or trainer.init_state(run)
        if restored:
            say(f"Resumed from step {first} of {self.resume}.")
        state = _fit(run, state, step, folder, console)
        held = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
        baseline = memory_report(run.tx, run.params).fp32_muon_adamw_bytes
        say(
            f"\nOptimizer state: {report.megabytes(held)}; "
            f"FP32 Muon + AdamW: {report.megabytes(baseline)}."
        )
        _print_sample(run, state, console)


@dataclasses.dataclass(frozen=True)
class Plan(Config):
    """Trains nothing: groups, exact bytes of state, the compiled update's memory.

    Attributes:
      config_file: TOML file with settings. Flags override it.
      json: Whether to print one JSON object.
      device: Where the update would be computed.
    """

    config_file: str | None = None
    json: bool = False
    device: Literal["auto", "cpu", "gpu"] = "auto"

    def run(self) -> None:
        """Prints the plan."""
        with _usage_errors():
            device.use(self.device, None)
        config = _settings(self)
        _, params = setup.abstract_model(config)
        tx = build_optimizer(config, params)
        held = memory_report(tx, params)
        groups = report.parameter_groups(config, params, held)
        update = compiled_bytes(tx, params)
        flops = report.step_flops(config, params)
        if self.json:
            plan = {"variant": config.variant, **held.to_dict(), "update": update}
            print(json.dumps({**plan, "flops": flops, "groups": groups}, indent=2))
            return
        console = Console()
        _say(console, report.optimizer_summary(config, held) + "\n")
        console.print(report.group_table(groups))
        if config.use_galore:
            console.print(report.rank_table(config, params))
        _say(
            console,
            f"Compiled update on {device.describe()}: "
            f"{report.megabytes(update['temp_bytes'])} of temporaries beside "
            f"{report.megabytes(update['argument_bytes'])} of gradients, state and "
            "what it reads of the parameters.\n" + report.flops_summary(config, flops),
        )


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      args: Arguments; those of the process if not given.

    Returns:
      The exit code.
    """
    warnings.showwarning = _show_warning
    try:
        with _usage_errors():
            command = _parse(sys.argv[1:] if args is None else args)
        command.run()
    except (FloatingPointError, KeyboardInterrupt) as error:
        print(f"error: {error or 'interrupted'}", file=sys.stderr)
        return 1
    return 0


def _parse(args: Sequence[str]) -> Train | Plan:
    """Returns the command, its settings those of the flags, then of the file."""
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config-file", "--config_file")
    file = before.parse_known_args(args)[0].config_file
    train, plan = (
        # The type checker does not see that `from_toml` keeps the class.
        kind.from_toml(file) if file else kind()
        for kind in (Train, Plan)
    )
    return tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[Plan, tyro.conf.subcommand("plan", default=plan)],
        args=args,
        prog="nanochat-jax",
        description="Trains GPTs with Muon, 8-bit momentum and GaLore.",
    )


def _settings(command: Config) -> Config:
    """Returns the settings of a command without its own flags."""
    names = [field.name for field in dataclasses.fields(Config)]
    return Config(**{name: getattr(command, name) for name in names})


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
    step: jax.stages.Compiled,
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
            step,
            display=display,
            metrics=metrics,
            checkpoints=checkpoints,
        )


def _print_sample(run: setup.Run, state: trainer.TrainState, console: Console) -> None:
    """Prints text the model continues, if it was trained on text."""
    config = run.config
    if config.dataset not in ("stdlib", "text") or not config.sample_tokens:
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
    _say(console, f"\nA sample:\n{text}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _compiled(step: jax.stages.Compiled, seconds: float) -> str:
    line = f"Compiled the training step in {seconds:.1f} s"
    planned = step.memory_analysis()
    if planned is None:
        return line
    peak = planned.argument_size_in_bytes + planned.temp_size_in_bytes
    return f"{line}; it plans {report.megabytes(peak)} with parameters and state."


def _count(params: object) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """Ends with one message and exit code 2 on settings or data that do not do."""
    try:
        yield
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
