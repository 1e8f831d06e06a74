"""Memory and traffic of a run on a mesh, from shapes alone.

Nothing is allocated or compiled, and the devices need not exist.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from nanochat_jax.config import Config
from nanochat_jax.lm.model import (
    Params,
    activation_sharding,
    build_optimizer,
    gpt,
    param_sharding,
)
from nanochat_jax.lm.planning import breakdown, optimizer_summary, variants
from nanochat_jax.lm.planning.step_traffic import Traffic, step_traffic
from nanochat_jax.lm.planning.update_traffic import busiest_flops, update_traffic
from nanochat_jax.optimizer import MemoryReport, bytes_per_device, memory_report

VARIANTS = (
    "muon", "muon_8bit", "muon_4bit", "galore", "galore_8bit", "galore_4bit",
    "galore_plain", "galore_plain_8bit",
)  # fmt: skip
"""Variants that a plan sets side by side."""


@dataclasses.dataclass(frozen=True)
class ScalePlan:
    """Memory and traffic of a run on a mesh.

    Attributes:
      config: Its settings.
      params: Shapes, types and shardings of its parameters.
      held: Memory of its optimizer.
      forward: Collectives of loss and gradients.
      update: Collectives of an update of the matrices.
      flops: Operations of a step, from `breakdown.step_flops`.
      busiest: Operations of Newton-Schulz on the device that has the most of them.
    """

    config: Config
    params: Params
    held: MemoryReport
    forward: list[Traffic]
    update: list[Traffic]
    flops: dict[str, float]
    busiest: int

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.params["embed"]["embedding"].sharding.mesh.size

    @property
    def update_bytes(self) -> float:
        """Bytes that a device sends for an update, a mean over steps."""
        return sum(row.sent_bytes / row.every for row in self.update)

    @property
    def device_bytes(self) -> dict[str, int]:
        """Bytes on a device: parameters, gradients, and each field of the state."""
        params = bytes_per_device(self.params)
        held = {"params": params, "gradients": params}
        for row in self.held.rows:
            key = f"state.{row.label}.{row.field}"
            held[key] = held.get(key, 0) + (row.device_bytes or 0)
        return held

    @property
    def held_bytes(self) -> int:
        """Bytes of parameters and state on a device."""
        return bytes_per_device(self.params) + self.held.device_bytes

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as plain numbers."""
        held, config = self.device_bytes, self.config
        return {
            "variant": config.variant,
            **self.held.to_dict(),
            "mesh": dict(param_sharding.full(config.mesh)),
            "devices": self.devices,
            "tokens_per_step": config.tokens_per_step,
            "device_bytes": {
                **held,
                "state": self.held.device_bytes,
                "total": sum(held.values()),
            },
            "collectives": [
                {**row._asdict(), "sent_bytes": row.sent_bytes}
                for row in (*self.forward, *self.update)
            ],
            "flops": {**self.flops, "busiest_newton_schulz": self.busiest},
            "groups": breakdown.parameter_groups(config, self.params, self.held),
        }


def plan_scale(config: Config, params: Params | None = None) -> ScalePlan:
    """Returns memory and traffic of a run.

    Args:
      config: Its settings, with a `mesh`.
      params: Shapes, types and shardings of its parameters, if known already.

    Raises:
      ValueError: If the mesh does not divide the sequences of a microbatch.
    """
    if params is None:
        devices = param_sharding.abstract_mesh(config.mesh)
        activation_sharding.check_batch(devices, config.batch_size)
        params = param_sharding.place(gpt.abstract_model(config)[1], devices, config)
    return ScalePlan(
        config,
        params,
        memory_report(build_optimizer(config, params), params),
        step_traffic(config, params),
        update_traffic(config, params),
        breakdown.step_flops(config, params),
        busiest_flops(config, params),
    )


def side_by_side(plan: ScalePlan) -> dict[str, dict[str, float]]:
    """Returns memory and traffic of other variants with the same settings, by name.

    Args:
      plan: Plan of the run.
    """
    chosen = variants.parse_variants(VARIANTS, plan.config, plan.config.lr)
    plans = {v.name: plan_scale(v.config, plan.params) for v in chosen}
    return {
        name: {
            "state_bytes": other.held.device_bytes,
            "sent_bytes": other.update_bytes,
            "update_share": other.flops["update_share"],
        }
        for name, other in plans.items()
    }


def tables(plan: ScalePlan, others: dict[str, dict[str, float]]) -> Group:
    """Returns a plan as tables, with the other variants side by side.

    Args:
      plan: The plan.
      others: Numbers of other variants, from `side_by_side`.
    """
    held, mb = plan.device_bytes, optimizer_summary.megabytes
    total = ("total", mb(sum(held.values())))
    return Group(
        _table(
            f"On each of {plan.devices} devices",
            ("what", "bytes"),
            [*((name, mb(size)) for name, size in held.items()), total],
        ),
        _table(
            "Sent in a step, by each device",
            ("what", "collective", "count", "over", "bytes", "every"),
            [
                (
                    row.what,
                    row.kind,
                    f"{row.count:,}",
                    str(row.devices),
                    mb(row.sent_bytes),
                    "step" if row.every == 1 else f"{row.every} steps",
                )
                for row in (*plan.forward, *plan.update)
            ],
        ),
        _table(
            "Variants, on each device",
            ("variant", "state", "sent to update", "update's share of FLOPs"),
            [
                (
                    name,
                    mb(other["state_bytes"]),
                    mb(other["sent_bytes"]),
                    f"{100 * other['update_share']:.2f} %",
                )
                for name, other in others.items()
            ],
        ),
    )


def limit(plan: ScalePlan) -> dict[str, Any]:
    """Returns the memory limit of a run, and whether its step fits.

    Activations are in no plan on paper, so that it is known only of steps that do not
    fit. `fits` is `None` for others, and nothing is tried in their place.

    Args:
      plan: Plan of a run with a limit.
    """
    most = plan.config.memory_limit_bytes or 0
    fits = False if plan.held_bytes > most else None
    return {"bytes": most, "fits": fits, "tried": []}


def summary(plan: ScalePlan) -> str:
    """Returns the operations of a step in words, and what is known about its limit.

    Args:
      plan: The plan.
    """
    even = plan.flops["update_newton_schulz"] / plan.devices
    more = plan.busiest / even if even else 1.0
    return (
        f"{optimizer_summary.flops_summary(plan.config, plan.flops)}\n"
        f"Of Newton-Schulz the busiest device has {plan.busiest / 1e9:,.0f} GFLOP, "
        f"{more:.2f} times an even share.{_limit_summary(plan)}"
    )


def _limit_summary(plan: ScalePlan) -> str:
    asked = plan.config.memory_limit
    if asked is None:
        return ""
    if limit(plan)["fits"] is False:
        return f"\n`memory_limit` {asked}: parameters and state alone are beyond it."
    return (
        f"\n`memory_limit` {asked}: parameters and state are within it; whether a step "
        "is, `train`\ntells once it has compiled it on these devices."
    )


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table
