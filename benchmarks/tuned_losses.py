"""Losses of variants that are tuned alike: each tries as many settings as float32 Muon.

    python benchmarks/tuned_losses.py --output D --batch-size 4

The settings of float32 Muon are searched first, then those of each contender, from the
best of Muon or of the contender it builds on; all with one seed, and every run with all
steps. Each is then trained with three other seeds, and with 0.97 to 0.85 of the steps,
warm-up and decay shrunk alike, as long as that gets to Muon's loss. A run is one of
`nanochat-jax compare`, by the name it has there, so that each can be had alone, and a
search that was stopped goes on.
"""

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import statistics
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import common
from contenders import CONTENDERS, Axes, Settings
from rich.console import Console

from nanochat_jax.config import Config
from nanochat_jax.experiments import figures, plan_trials, read_results, run_trial
from nanochat_jax.lm.planning import parse_variants
from nanochat_jax.lm.training import make_run

Losses = Callable[[Sequence[Settings]], list[float]]

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
FRACTIONS = (0.97, 0.95, 0.90, 0.85)
TUNING_SEED, SEEDS = 0, (1, 2, 3)


class Task(NamedTuple):
    """A run: a variant with settings, a seed, and the part of the steps."""

    name: str
    seed: int
    fraction: float


def train(task: Task, flags: argparse.Namespace) -> dict[str, Any]:
    """Trains a run, if it has no result yet; returns what `compare` writes of it."""
    config = Config.from_toml(flags.config_file)
    shrunk = {
        key: round(task.fraction * getattr(config, key))
        for key in ("total_steps", "warmup_steps")
    }
    batch = flags.batch_size or config.batch_size
    config = dataclasses.replace(config, seed=task.seed, batch_size=batch, **shrunk)
    variants = parse_variants([task.name], config, config.fallback_peak_lr)
    folder = Path(flags.output) / f"{config.total_steps}_steps"
    folder.mkdir(parents=True, exist_ok=True)
    [trial] = plan_trials(make_run(config), variants, 1, folder)
    done = [*read_results([trial]).values()]
    return done[0] if done else run_trial(trial, Console(quiet=True))


def descend(start: Settings, axes: Axes, budget: int, losses: Losses) -> Settings:
    """Searches one setting after the other, from value to neighbouring value.

    Args:
      start: Settings to begin from.
      axes: Values of each setting, in order.
      budget: Most settings to try, the first among them.
      losses: Trains with each of several settings.

    Returns:
      The best settings seen.
    """
    key = functools.partial(json.dumps, sort_keys=True)
    seen: dict[str, float] = {}

    def best_of(candidates: Sequence[Settings]) -> Settings:
        new = [x for x in candidates if key(x) not in seen][: budget - len(seen)]
        seen.update(zip(map(key, new), losses(new), strict=True))
        return min(candidates, key=lambda x: seen.get(key(x), math.inf))

    best, before = best_of([start]), None
    while best != before:
        before = best
        for name, values in axes.items():
            line = None
            while best != line:
                line = best
                best = best_of([best, *_neighbours(best, name, values)])
    return best


def _neighbours(
    settings: Settings, name: str, values: tuple[Any, ...]
) -> Iterator[Settings]:
    at = values.index(settings[name])
    yield from ({**settings, name: x} for x in values[at + 1 : at + 2])
    yield from ({**settings, name: x} for x in values[max(at - 1, 0) : at])


class Study:
    """Runs of all contenders, as many at a time as there are processes."""

    def __init__(self, flags: argparse.Namespace, processes: ProcessPoolExecutor):
        self.flags, self.processes = flags, processes
        self.best: dict[str, Future[Settings]] = {}
        self.runs: dict[Task, Future[dict[str, Any]]] = {}
        self.lock = threading.Lock()

    def submit(self, task: Task) -> Future[dict[str, Any]]:
        """Returns the run of a task, which is made once."""
        with self.lock:
            if task not in self.runs:
                self.runs[task] = self.processes.submit(train, task, self.flags)
            return self.runs[task]

    def results(
        self, variant: str, settings: Sequence[Settings], seeds: Sequence[int], part=1.0
    ) -> list[dict[str, Any]]:
        """Returns the results of each of several settings with each seed."""
        names = [_name(variant, each) for each in settings]
        tasks = [Task(name, seed, part) for name in names for seed in seeds]
        results = [self.submit(task) for task in tasks]
        for task, result in zip(tasks, results, strict=True):
            loss = result.result()["val_loss"]
            print(f"{loss} seed {task.seed}, {part:.2f}: {task.name}", flush=True)
        return [result.result() for result in results]

    def tune(self, name: str) -> Settings:
        """Returns the best settings of a contender, after those of its parent."""
        contender = CONTENDERS[name]
        parent = contender.parent and self.best[contender.parent].result()
        start = {**(parent or {}), **contender.settings}
        if not contender.axes or self.flags.budget == 1:  # nothing to choose from
            return start

        def losses(settings: Sequence[Settings]) -> list[float]:
            results = self.results(contender.variant, settings, [TUNING_SEED])
            return [_or_infinite(result["val_loss"]) for result in results]

        return descend(start, contender.axes, self.flags.budget, losses)

    def measure(self, name: str) -> dict[str, Any]:
        """Returns a contender's losses with other seeds, with fewer steps too."""
        best = self.best[name].result()
        final = self.final(name, 1.0)
        row = {
            "name": _name(CONTENDERS[name].variant, best),
            "state_bytes": final[0]["matrix_state_bytes"],
            "total_state_bytes": final[0]["total_state_bytes"],
            "temp_bytes": final[0]["temp_bytes"],
            "losses": {"1.0": [result["val_loss"] for result in final]},
        }
        target = _mean(self.final("Muon", 1.0))
        for part in self.flags.fractions if name != "Muon" else ():
            results = self.final(name, part)
            row["losses"][str(part)] = [result["val_loss"] for result in results]
            if _mean(results) > target:
                break
        return row

    def final(self, name: str, part: float) -> list[dict[str, Any]]:
        best = self.best[name].result()
        return self.results(CONTENDERS[name].variant, [best], SEEDS, part)


def _name(variant: str, settings: Settings) -> str:
    text = lambda x: x if isinstance(x, str) else json.dumps(x)
    return f"{variant}:{','.join(f'{k}={text(v)}' for k, v in settings.items())}"


def _with_parents(names: Iterable[str]) -> list[str]:
    """Returns the contenders and those they build on, each after its own."""
    needed = {"Muon", *names}
    for name in reversed(CONTENDERS):
        if name in needed:
            needed.add(CONTENDERS[name].parent or name)
    return [name for name in CONTENDERS if name in needed]


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None else loss


def _mean(results: Sequence[Mapping[str, Any]]) -> float:
    return statistics.fmean(_or_infinite(result["val_loss"]) for result in results)


def rows_of(report: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Returns the table: state, losses, ratios of runs of one seed, steps to Muon's."""
    muon = report["Muon"]
    base = muon["losses"]["1.0"]
    rows = []
    for name, row in report.items():
        losses = [_or_infinite(loss) for loss in row["losses"]["1.0"]]
        ratios = [own / other for own, other in zip(losses, base, strict=True)]
        reached = [
            float(part)
            for part, values in row["losses"].items()
            if statistics.fmean(map(_or_infinite, values)) <= statistics.fmean(base)
        ]
        rows.append(
            {
                "variant": name,
                "state": f"{row['state_bytes'] / muon['state_bytes']:.1%}",
                "temporaries MB": f"{row['temp_bytes'] / 1e6:.1f}",
                "loss": _spread(losses),
                "ratio": _spread(ratios),
                "steps to Muon's": f"{min(reached):.2f}" if reached else "-",
            }
        )
    return rows


def drawn(report: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns what the figure of losses by bytes needs of each contender."""
    return {
        name: {
            "total_state_bytes": row["total_state_bytes"],
            "val_loss": None if None in losses else statistics.fmean(losses),
            "val_loss_std": None if None in losses else statistics.stdev(losses),
            "seeds": SEEDS,
        }
        for name, row in report.items()
        for losses in [row["losses"]["1.0"]]
    }


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", default="configs/compare_3m.toml")
    parser.add_argument("--batch-size", type=int, help="in place of the file's")
    parser.add_argument(
        "--budget",
        type=int,
        default=12,
        help="settings to try of each; 1 for those of contenders.py",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, help="with parents")
    parser.add_argument(
        "--fractions",
        type=float,
        nargs="*",
        default=FRACTIONS,
        help="parts of the steps to get to Muon's loss in, none to leave that out",
    )
    parser.add_argument("--output", required=True, help="folder of runs and report")
    flags = parser.parse_args()
    os.environ["XLA_FLAGS"] = ONE_THREAD
    names = _with_parents(flags.only or CONTENDERS)
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(flags.workers, mp_context=spawn) as processes,
        ThreadPoolExecutor(len(CONTENDERS)) as threads,
    ):
        study = Study(flags, processes)
        for name in names:
            study.best[name] = threads.submit(study.tune, name)
        measured = {name: threads.submit(study.measure, name) for name in names}
        report = {name: each.result() for name, each in measured.items()}
    machine = common.machine()
    folder = Path(flags.output)
    common.write(folder / "report.json", {"machine": machine, "contenders": report})
    figures.save(figures.draw_loss_by_bytes(drawn(report)), folder / "by_bytes.png")
    common.show("Losses after equal tuning", rows_of(report))
    print(*(f"{name}: {row['name']}" for name, row in report.items()), sep="\n")


if __name__ == "__main__":
    main()
