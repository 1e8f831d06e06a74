"""Trials: variants of the optimizer trained on the same batches, with several seeds.

A trial is one variant with one seed. It runs the code of `train`, and writes two files:
its metrics, `NAME-seedS.jsonl`, and at the end its result beside them, as `.json`. A
comparison that was stopped goes on with the trials that have no result.
"""

import dataclasses
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from nanochat_jax.config import Config, schema, without_removed
from nanochat_jax.lm.checkpoints import differences
from nanochat_jax.lm.planning import Variant
from nanochat_jax.lm.runtime import (
    machine,
    require_writable,
    tree_bytes,
    write_text,
)
from nanochat_jax.lm.tracking import (
    MetricsWriter,
    busy,
    make_display,
    read_metrics,
)
from nanochat_jax.lm.training import (
    Reporter,
    Run,
    TrainState,
    compile_train_step,
    fit,
    init_state,
)
from nanochat_jax.optimizer import memory_report

_WITHOUT_EFFECT = schema.affecting(Config, "nothing")


@dataclasses.dataclass(frozen=True)
class Trial:
    """A variant to train with a seed.

    Attributes:
      variant: Name of the variant.
      run: Run to train.
      folder: Folder of its two files.
    """

    variant: str
    run: Run
    folder: Path

    @property
    def seed(self) -> int:
        """Seed of the parameters, the order of the data, and the sketches."""
        return self.run.config.seed

    @property
    def metrics(self) -> Path:
        """File of its metrics."""
        name = re.sub(r"[^\w.,=-]", "_", self.variant)
        return self.folder / f"{name}-seed{self.seed}.jsonl"

    @property
    def result(self) -> Path:
        """File of its result."""
        return self.metrics.with_suffix(".json")

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that its result must have been made with, as JSON values."""
        config = dataclasses.asdict(self.run.config)
        kept = {k: v for k, v in config.items() if k not in _WITHOUT_EFFECT}
        data = self.run.corpus.fingerprint
        return differences.as_json({"variant": self.variant, "data": data, **kept})


def plan_trials(
    base: Run, variants: Sequence[Variant], seeds: int, folder: Path
) -> list[Trial]:
    """Returns the trials, all variants with one seed before the next seed.

    Args:
      base: A run with the data and model of all trials.
      variants: Optimizers to compare.
      seeds: Number of seeds, from the seed of `base` on.
      folder: Folder of the results.
    """
    trials = []
    for seed in range(base.config.seed, base.config.seed + seeds):
        for variant in variants:
            config = dataclasses.replace(variant.config, seed=seed)
            tx = variant.build(config, base.params)
            run = dataclasses.replace(base, config=config, tx=tx)
            trials.append(Trial(variant.name, run, folder))
    return trials


def check_folder(folder: Path, names: Iterable[str]) -> None:
    """Refuses a folder that has other files than those of a comparison.

    Args:
      folder: Folder to write; it need not exist yet.
      names: Names of the files that a comparison writes, besides `runs`.

    Raises:
      ValueError: If there are other files, or the folder cannot be written.
    """
    runs = folder / "runs"
    found = [*folder.glob("[!.]*"), *runs.glob("[!.]*")]
    own = {folder / name for name in names} | {runs}
    foreign = sorted(
        str(path)
        for path in found
        if path not in own
        and path.suffix != ".tmp"
        and (path.parent != runs or path.suffix not in (".json", ".jsonl"))
    )
    more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
    schema.require(
        (
            not foreign,
            f"{folder}: has files that are not of a comparison: "
            f"{', '.join(foreign[:5])}{more}. Choose another `--output`.",
        )
    )
    require_writable(folders=[runs])


def read_results(trials: Iterable[Trial]) -> dict[tuple[str, int], dict[str, Any]]:
    """Reads the results of the trials that are done.

    Args:
      trials: Trials of the comparison.

    Returns:
      Results by variant and seed.

    Raises:
      ValueError: If results were made with other settings; it lists the differences.
    """
    results, errors = {}, []
    for trial in trials:
        if trial.result.exists() and trial.metrics.exists():
            result = json.loads(trial.result.read_text(encoding="utf-8"))
            results[trial.variant, trial.seed] = result
            errors += _differences(trial, result["settings"])
    if errors:
        raise ValueError(
            "Results that are there already are of other settings.\n"
            + "\n".join(f"  {error}" for error in errors)
            + "\nSet these as they were, delete the files named, or choose another "
            "`--output`."
        )
    return results


def run_trial(trial: Trial, console: Console) -> dict[str, Any]:
    """Trains one variant with one seed, and writes its result.

    A run that diverges has a result too, with `null` for the losses and an `error`.

    Args:
      trial: Trial to run.
      console: Where the progress is shown.

    Returns:
      The result: final losses, bytes held and planned, and seconds.
    """
    with busy(console, "Compiling the training step"):
        step = compile_train_step(trial.run)
    state = init_state(trial.run)
    result = {"settings": trial.settings, **_bytes_held(trial.run, state, step)}
    started, error = time.perf_counter(), None
    display = make_display(trial.run.config.total_steps, console=console)
    with MetricsWriter(trial.metrics) as metrics, display:
        metrics.resume(-1)
        try:
            reporter = Reporter(trial.run, 0, display, [metrics])
            fit(trial.run, state, step, reporter)
        except FloatingPointError as diverged:
            error = str(diverged)
    last = {} if error else read_metrics(trial.metrics)[-1]
    result |= {
        "val_loss": last.get("val_loss"),
        "val_bpb": last.get("val_bpb"),
        "seconds": time.perf_counter() - started,
        "error": error,
        **machine.hardware_and_versions(),
    }
    write_json(trial.result, result)
    return result


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON in one piece.

    Args:
      path: File to write; its folder is made.
      value: JSON values.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _bytes_held(
    run: Run, state: TrainState, step: jax.stages.Compiled
) -> dict[str, int | None]:
    """Returns bytes of the optimizer state, and temporaries of the compiled step."""
    planned = step.memory_analysis()
    return {
        "matrix_state_bytes": memory_report(run.tx, run.params).matrix_bytes,
        "total_state_bytes": tree_bytes(state.opt_state),
        "temp_bytes": planned and int(planned.temp_size_in_bytes),
    }


def _differences(trial: Trial, stored: dict[str, Any]) -> list[str]:
    """Returns a line for each setting that differs; new settings had their defaults."""
    known = without_removed(stored, str(trial.result))
    before = differences.flat(dataclasses.asdict(Config()) | known)
    changed = differences.changes(before, differences.flat(trial.settings))
    return [
        f"{trial.result}: `{key}` was {old}, is {new}"
        for key, (old, new) in changed.items()
        if key not in _WITHOUT_EFFECT
    ]
