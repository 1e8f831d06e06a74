"""`nanochat-jax plan`: what a run would hold and compute."""

import dataclasses
import json
from typing import Any

from rich.console import Console

from nanochat_jax.commands.shared import (
    Flags,
    say,
    say_derived,
    settings_of,
    usage_errors,
)
from nanochat_jax.config import Config
from nanochat_jax.config.base import derived_from
from nanochat_jax.lm import device, mesh, planning, report, scaling, trainer
from nanochat_jax.lm.accumulate import accumulator_bytes
from nanochat_jax.memory import compiled_bytes, memory_report


@dataclasses.dataclass(frozen=True)
class PlanFlags(Flags):
    """Flags of `plan` besides the settings.

    Attributes:
      json: Whether to print one JSON object.
    """

    json: bool = False


@dataclasses.dataclass(frozen=True)
class Plan(Config, PlanFlags):
    """Trains nothing: groups, exact bytes of state, peak memory of a compiled step.

    With a mesh it is on paper, for devices that need not be there: what each of them
    holds and sends.
    """

    def run(self) -> None:
        """Prints the plan."""
        with usage_errors():
            device.use(self.device, self.threads)
            if self.mesh:
                self._print_on_paper(scaling.plan_scale(settings_of(self)))
            else:
                self._print_compiled()

    def _print_on_paper(self, plan: scaling.ScalePlan) -> None:
        others = scaling.side_by_side(plan)
        if self.json:
            numbers = {**plan.to_dict(), "variants": others, **self._derived()}
            print(json.dumps(numbers, indent=2))
            return
        console = Console()
        say_derived(console, self)
        say(console, report.optimizer_summary(plan.config, plan.held) + "\n")
        say(console, mesh.describe(plan.params, plan.config) + "\n")
        console.print(scaling.tables(plan, others))
        say(console, scaling.summary(plan))

    def _derived(self) -> dict[str, Any]:
        """Returns the settings that follow from depth or model, by which it is."""
        values = {"fallback": self.fallback, "mesh": self.mesh}
        for key in ("depth", "model"):
            if getattr(self, key) is not None:
                derived = derived_from({**values, key: getattr(self, key)})
                return {key: {name: getattr(self, name) for name in derived}}
        return {}

    def _print_compiled(self) -> None:
        config = settings_of(self)
        run = planning.abstract_run(config)
        params, tx = run.params, run.tx
        held = memory_report(tx, params)
        groups = report.parameter_groups(config, params, held)
        low_rank = trainer.compile_low_rank_step(run)
        steps = [trainer.compile_train_step(run), *([low_rank] if low_rank else [])]
        peak = planning.plan_run(run, steps)
        update = compiled_bytes(tx, params)
        flops = report.step_flops(config, params)
        accumulator = accumulator_bytes(config, tx, params)
        if self.json:
            plan = {"variant": config.variant, **held.to_dict(), "update": update}
            plan |= {"run": peak._asdict(), "flops": flops}
            plan |= {"groups": groups, "accumulator": accumulator}
            print(json.dumps({**plan, **self._derived()}, indent=2))
            return
        console = Console()
        say_derived(console, self)
        say(console, report.optimizer_summary(config, held) + "\n")
        console.print(report.group_table(groups))
        if config.use_galore:
            console.print(report.rank_table(config, params))
        say(
            console,
            f"Compiled update on {device.describe()}:\n"
            f"  temporaries {report.megabytes(update['temp_bytes'])}\n"
            "  gradients, state and what is read of the parameters "
            f"{report.megabytes(update['argument_bytes'])}\n"
            f"{planning.plan_summary(config, peak)}\n"
            f"{report.flops_summary(config, flops)}",
        )
        if config.grad_accum_steps > 1:
            say(console, report.accumulator_summary(config, accumulator))
