"""`nanochat-jax plan`: memory and operations of a run, without running it."""

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
from nanochat_jax.config import Config, derived_from
from nanochat_jax.lm.model import param_sharding
from nanochat_jax.lm.planning import (
    breakdown,
    limit_summary,
    memory_limit,
    mesh_plan,
    optimizer_summary,
    run_memory,
)
from nanochat_jax.lm.runtime import machine
from nanochat_jax.lm.training import Run, compile_train_step
from nanochat_jax.optimizer import compiled_bytes, memory_report


@dataclasses.dataclass(frozen=True)
class PlanFlags(Flags):
    """Flags of `plan` besides the settings.

    Attributes:
      json: Whether to print one JSON object.
    """

    json: bool = False


@dataclasses.dataclass(frozen=True)
class Plan(Config, PlanFlags):
    """Prints groups, exact bytes of state, and peak memory of a compiled step.

    Nothing is trained. With `--memory-limit` it tells whether the step fits, and if not
    names the cheapest settings that fit, in the order of their cost in loss. With a
    mesh nothing is compiled either, and the devices need not exist: it prints the bytes
    that each of them holds and sends.
    """

    def run(self) -> None:
        """Prints the plan."""
        with usage_errors():
            machine.use_device(self.device, self.threads)
            if self.mesh:
                self._print_on_paper(mesh_plan.plan_scale(settings_of(self)))
            else:
                self._print_compiled()

    def _print_on_paper(self, plan: mesh_plan.ScalePlan) -> None:
        others = mesh_plan.side_by_side(plan)
        if self.json:
            numbers = {**plan.to_dict(), "variants": others, **self._derived()}
            if plan.config.memory_limit:
                numbers["memory_limit"] = mesh_plan.limit(plan)
            print(json.dumps(numbers, indent=2))
            return
        console = Console()
        say_derived(console, self)
        say(console, optimizer_summary.optimizer_summary(plan.config, plan.held) + "\n")
        say(console, param_sharding.mesh_summary(plan.params, plan.config) + "\n")
        console.print(mesh_plan.tables(plan, others))
        say(console, mesh_plan.summary(plan))

    def _derived(self) -> dict[str, Any]:
        """Returns the settings derived from `depth` or `model`, under that name."""
        values = {"fallback": self.fallback, "mesh": self.mesh}
        for key in ("depth", "model"):
            if getattr(self, key) is not None:
                derived = derived_from({**values, key: getattr(self, key)})
                return {key: {name: getattr(self, name) for name in derived}}
        return {}

    def _print_compiled(self) -> None:
        config = settings_of(self)
        run = run_memory.abstract_run(config)
        peak = run_memory.plan_run(run, compile_train_step(run))
        found = None
        if config.memory_limit:
            found = memory_limit.search(config, peak.step_bytes)
        if self.json:
            numbers = _numbers(run, peak) | self._derived()
            if found:
                numbers["memory_limit"] = found.to_dict()
            print(json.dumps(numbers, indent=2))
            return
        console = Console()
        say_derived(console, self)
        _say_optimizer(console, run)
        flops = breakdown.step_flops(config, run.params)
        say(console, run_memory.plan_summary(config, peak))
        say(console, optimizer_summary.flops_summary(config, flops))
        if found:
            say(console)
            console.print(limit_summary.limit_table(found))
            said = limit_summary.limit_summary(config, found, peak.init_bytes)
            say(console, said)


def _numbers(run: Run, peak: run_memory.RunPlan) -> dict[str, Any]:
    """Returns the plan of a run as plain values."""
    config, params = run.config, run.params
    held = memory_report(run.tx, params)
    return {
        "variant": config.variant,
        **held.to_dict(),
        "update": compiled_bytes(run.tx, params),
        "run": peak.to_dict(),
        "step": run_memory.step_bytes(peak),
        "step_parts": peak.parts._asdict(),
        "flops": breakdown.step_flops(config, params),
        "groups": breakdown.parameter_groups(config, params, held),
    }


def _say_optimizer(console: Console, run: Run) -> None:
    """Prints groups and state of the optimizer, and its update by itself."""
    config, params = run.config, run.params
    held = memory_report(run.tx, params)
    said = optimizer_summary.optimizer_summary(config, held, labels=False)
    say(console, said + "\n")
    groups = breakdown.parameter_groups(config, params, held)
    console.print(optimizer_summary.group_table(groups))
    if config.use_galore:
        console.print(optimizer_summary.rank_table(config, params))
    if config.update_in_backward:
        return  # there is no update apart from the passes
    update = compiled_bytes(run.tx, params)
    say(
        console,
        f"Compiled update on {machine.device_names()}:\n"
        f"  temporaries {optimizer_summary.megabytes(update['temp_bytes'])}\n"
        "  gradients, state and what is read of the parameters "
        f"{optimizer_summary.megabytes(update['argument_bytes'])}",
    )
