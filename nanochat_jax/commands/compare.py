"""`nanochat-jax compare`: training runs of optimizer variants, side by side."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from nanochat_jax.commands.shared import (
    Flags,
    say,
    say_derived,
    settings_of,
    usage_errors,
)
from nanochat_jax.config import Config, schema
from nanochat_jax.experiments import (
    Trial,
    check_folder,
    figures,
    plan_trials,
    read_results,
    results as summary,
    run_trial,
    speed,
    write_json,
)
from nanochat_jax.lm.planning import parse_variants
from nanochat_jax.lm.runtime import machine
from nanochat_jax.lm.tracking import busy
from nanochat_jax.lm.training import make_run

_REPORT = "report.json"
_FIGURES = ("loss_by_step.png", "loss_by_bytes.png")


@dataclasses.dataclass(frozen=True)
class CompareFlags(Flags):
    """Flags of `compare` besides the settings.

    Attributes:
      output: Folder for `report.json`, figures, and the metrics and result of each run.
        Started again, it goes on where it stopped.
      steps: Steps of each run, in place of `total_steps`.
      variants: Variants by name: muon, muon_8bit, muon_4bit, galore, galore_8bit,
        galore_4bit, galore_plain, galore_plain_8bit (without residual), adamw and
        adamw_galore (AdamW for all parameters). Settings of the optimizer may follow a
        name, as in `galore_8bit:galore_rank=32,quant_block_size=64`.
      seeds: Seeds to train each variant with, from `seed` on.
      adamw_lr: Peak learning rate of the AdamW variants; `fallback_lr` if not given.
      speed_steps: Steps of each variant to time at the end, in turns; 0 for none.
    """

    output: str | None = None
    steps: int | None = None
    variants: tuple[str, ...] = ("muon", "muon_8bit", "galore", "galore_8bit")
    seeds: int = 1
    adamw_lr: float | None = None
    speed_steps: int = 20


@dataclasses.dataclass(frozen=True)
class Compare(Config, CompareFlags):
    """Trains variants of the optimizer on the same batches, and compares them.

    Every setting of the TOML file is also a flag, for all variants. Writes to `output`:
    `report.json`, `loss_by_step.png`, `loss_by_bytes.png`, and `runs` with the metrics
    and the result of each run.
    """

    def run(self) -> None:
        """Trains the remaining variants, writes the report and prints its table."""
        console = Console()
        with usage_errors():
            self._check()
            machine.use_device(self.device, self.threads)
            trials = self._trials()
            results = read_results(trials)
        say_derived(console, self)
        say(console, f"{len(trials)} runs, {len(results)} of them done already")
        for number, trial in enumerate(trials, 1):
            key = trial.variant, trial.seed
            if key in results:
                continue
            say(console, f"\n{number}/{len(trials)}: {key[0]}, seed {key[1]}")
            results[key] = run_trial(trial, console)
            if results[key]["error"]:
                say(console, f"diverged: {results[key]['error']}")
            self._write(trials, results, {})
        variants = self._write(trials, results, self._speeds(trials, console))
        console.print(summary.table(variants))
        say(console, f"Report:  {self._folder / _REPORT}")
        say(console, f"Figures: {', '.join(str(self._folder / x) for x in _FIGURES)}")

    def how_to_go_on(self) -> str:
        """Returns where the report of the runs that are done lies, and what to do."""
        again = "The same command goes on with the runs that are not done."
        if self.output is None or not (self._folder / _REPORT).exists():
            return again
        return f"{again}\nReport of those that are: {self._folder / _REPORT}"

    def _check(self) -> None:
        """Refuses invalid flags, before anything is loaded."""
        at_least = {"steps": 1, "seeds": 1, "speed_steps": 0, "adamw_lr": 0}
        schema.require(
            (
                self.output is not None,
                "`--output` is required: the folder for report, figures and runs.",
            ),
            *schema.lower_bounds(self, at_least),
        )
        figures.require_matplotlib()
        check_folder(self._folder, (_REPORT, *_FIGURES))

    @property
    def _config(self) -> Config:
        """Settings of all variants."""
        config = settings_of(self)
        if self.steps is None:
            return config
        return dataclasses.replace(config, total_steps=self.steps)

    @property
    def _adamw_lr(self) -> float:
        given = self.adamw_lr
        return self._config.fallback_peak_lr if given is None else given

    @property
    def _folder(self) -> Path:
        assert self.output is not None
        return Path(self.output)

    def _trials(self) -> list[Trial]:
        """Returns the trials, with names and data checked."""
        variants = parse_variants(self.variants, self._config, self._adamw_lr)
        base = make_run(self._config)
        return plan_trials(base, variants, self.seeds, self._folder / "runs")

    def _speeds(self, trials: list[Trial], console: Console) -> dict[str, speed.Speed]:
        """Times the variants in turns, unless `speed_steps` is 0."""
        if not self.speed_steps:
            return {}
        say(console)
        runs = {trial.variant: trial.run for trial in trials if trial.seed == self.seed}
        with busy(console, "Compiling the variants, and timing them in turns"):
            return speed.side_by_side(runs, self.speed_steps)

    def _write(
        self,
        trials: list[Trial],
        results: summary.Results,
        speeds: dict[str, speed.Speed],
    ) -> dict[str, dict[str, Any]]:
        """Writes report and figures of finished runs; returns numbers by variant."""
        variants = summary.summarize(trials, results, speeds)
        report = {
            "steps": self._config.total_steps,
            "seeds": self.seeds,
            "done": f"{len(results)} of {len(trials)} runs",
            **machine.hardware_and_versions(),
            "data": trials[0].run.corpus.description,
            "adamw_lr": self._adamw_lr,
            "config": dataclasses.asdict(self._config),
            "variants": variants,
        }
        write_json(self._folder / _REPORT, report)
        drawn = figures.draw_loss_by_step, figures.draw_loss_by_bytes
        for name, draw in zip(_FIGURES, drawn, strict=True):
            figures.save(draw(variants), self._folder / name)
        return variants
