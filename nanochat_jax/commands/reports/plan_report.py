"""The plan of a run, as text or as one JSON object."""

import dataclasses
import json
from typing import Any

from rich.console import Console

from nanochat_jax.commands.shared import say, say_derived
from nanochat_jax.config import Config, derived_from
from nanochat_jax.lm.model import param_sharding
from nanochat_jax.lm.planning import (
    breakdown,
    limit_summary,
    memory_limit,
    mesh_plan,
    optimizer_summary,
    part_lines,
    parts_from_shapes,
    run_memory,
)
from nanochat_jax.lm.runtime import machine, tree_bytes
from nanochat_jax.lm.training import Run, compile_train_step
from nanochat_jax.optimizer import (
    MemoryReport,
    compiled_bytes,
    describe,
    memory_report,
)

_COMPILED = "temporaries, peak of a step, peak before the first"


def print_plan(command: Any, config: Config) -> None:
    """Prints the plan of a run.

    Args:
      command: The command, a `Plan`.
      config: The settings among its flags.
    """
    machine.use_device(command.device, command.threads)
    if command.parameters:
        _print_parameters(command, run_memory.abstract_run(config))
    elif config.mesh:
        _print_on_paper(command, mesh_plan.plan_scale(config))
    elif command.compile:
        _print_compiled(command, run_memory.abstract_run(config))
    else:
        _print_shapes(command, run_memory.abstract_run(config))


def _print_parameters(command: Any, run: Run) -> None:
    described = describe(run.tx, run.params)
    if command.json:
        print(json.dumps(dataclasses.asdict(described), indent=2))
        return
    say(Console(), str(described))


def _print_on_paper(command: Any, plan: mesh_plan.ScalePlan) -> None:
    others = mesh_plan.side_by_side(plan)
    if command.json:
        numbers = {**plan.to_dict(), "variants": others, **_derived(command)}
        if plan.config.memory_limit:
            numbers["memory_limit"] = mesh_plan.limit(plan)
        print(json.dumps(numbers, indent=2))
        return
    console = Console()
    say_derived(console, command)
    say(console, optimizer_summary.optimizer_summary(plan.config, plan.held) + "\n")
    say(console, param_sharding.mesh_summary(plan.params, plan.config) + "\n")
    console.print(mesh_plan.tables(plan, others))
    say(console, mesh_plan.summary(plan))


def _print_compiled(command: Any, run: Run) -> None:
    config = run.config
    peak = run_memory.plan_run(run, compile_train_step(run))
    held = memory_report(run.tx, run.params)
    found = update = None
    if command.json or not config.update_in_backward:
        update = compiled_bytes(run.tx, run.params)
    if config.memory_limit:
        found = memory_limit.search(config, peak.step_bytes)
    if command.json:
        numbers = {
            **_known(run, held),
            "update": update,
            "run": peak.to_dict(),
            "step": run_memory.step_bytes(peak),
            "step_parts": peak.parts._asdict(),
            **_derived(command),
        }
        if found:
            numbers["memory_limit"] = found.to_dict()
        print(json.dumps(numbers, indent=2))
        return
    console = Console()
    say_derived(console, command)
    _say_optimizer(console, run, held)
    if config.use_galore:
        console.print(optimizer_summary.rank_table(config, run.params))
    if update:  # in the backward pass there is no update apart
        say(console, _update_lines(update))
    say(console, run_memory.plan_summary(config, peak))
    _say_operations(console, run)
    if found:
        say(console)
        console.print(limit_summary.limit_table(found))
        said = limit_summary.limit_summary(config, found, peak.init_bytes)
        say(console, said)


def _print_shapes(command: Any, run: Run) -> None:
    """Prints what the shapes of parameters and state tell, and what they do not."""
    config, held = run.config, memory_report(run.tx, run.params)
    parts = parts_from_shapes(config, run.params, held)
    weights = tree_bytes(run.params)
    if command.json:
        numbers = {
            **_known(run, held),
            "step": {"weights_bytes": weights, "state_bytes": held.total_bytes},
            "step_parts": parts._asdict(),
            "needs_compiling": _COMPILED,
            **_derived(command),
        }
        print(json.dumps(numbers, indent=2))
        return
    console = Console()
    say_derived(console, command)
    _say_optimizer(console, run, held)
    rate = (weights + held.total_bytes) / parts.params
    lines = [
        f"Known of a step of {config.tokens_per_step:,} tokens from shapes alone:",
        *part_lines(config, parts, weights, held.total_bytes),
        f"    weights and state {rate:.2f} bytes a parameter",
        f"Not known without compiling: {_COMPILED}.",
        "Leave out `--no-compile` for these.",
    ]
    say(console, "\n".join(lines))
    _say_operations(console, run)


def _known(run: Run, held: MemoryReport) -> dict[str, Any]:
    """Returns the numbers of a run that need no compiled program."""
    config, params = run.config, run.params
    return {
        "variant": config.variant,
        **held.to_dict(),
        "flops": breakdown.step_flops(config, params),
        "groups": breakdown.parameter_groups(config, params, held),
    }


def _derived(command: Any) -> dict[str, Any]:
    """Returns the settings derived from `depth` or `model`, under that name."""
    values = {"fallback": command.fallback, "mesh": command.mesh}
    for key in ("depth", "model"):
        if getattr(command, key) is not None:
            derived = derived_from({**values, key: getattr(command, key)})
            return {key: {name: getattr(command, name) for name in derived}}
    return {}


def _say_optimizer(console: Console, run: Run, held: MemoryReport) -> None:
    """Prints groups and state of the optimizer."""
    said = optimizer_summary.optimizer_summary(run.config, held, labels=False)
    say(console, said + "\n")
    groups = breakdown.parameter_groups(run.config, run.params, held)
    console.print(optimizer_summary.group_table(groups))


def _say_operations(console: Console, run: Run) -> None:
    flops = breakdown.step_flops(run.config, run.params)
    say(console, optimizer_summary.flops_summary(run.config, flops))


def _update_lines(update: dict[str, int]) -> str:
    return (
        f"Compiled update on {machine.device_names()}:\n"
        f"  temporaries {optimizer_summary.megabytes(update['temp_bytes'])}\n"
        "  gradients, state and what is read of the parameters "
        f"{optimizer_summary.megabytes(update['argument_bytes'])}"
    )
