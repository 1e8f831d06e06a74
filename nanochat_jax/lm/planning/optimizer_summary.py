"""Text and tables about an optimizer, printed before a run."""

import dataclasses
import functools
import textwrap
from typing import Any

import jax
import optax
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from nanochat_jax.config import HARDWARE_RANKS, Config
from nanochat_jax.lm.model import build_optimizer, label_params
from nanochat_jax.lm.planning import breakdown
from nanochat_jax.numerics import GRAM_RATIO, resolve_dtype
from nanochat_jax.optimizer import MemoryReport, memory_report
from nanochat_jax.polynomials import FLOAT32_METHODS


def megabytes(count: float) -> str:
    """Returns a number of bytes in MB, 10⁶ bytes."""
    return f"{count / 1e6:.1f} MB"


def variant_title(config: Config) -> str:
    """Returns the Muon variant in words, such as `"GaLore 2 + 8-bit Muon"`."""
    muon = f"{config.quant_bits}-bit Muon" if config.use_8bit_optim else "Muon"
    return f"GaLore 2 + {muon}" if config.use_galore else muon


def optimizer_summary(
    config: Config, report: MemoryReport, *, labels: bool = True
) -> str:
    """Returns the lines about the optimizer at the start of a run.

    Args:
      config: Settings of the run.
      report: Memory of its optimizer.
      labels: Whether to say how the state of each label is stored; `group_table` does
        too.
    """
    held = report.to_dict()
    dtype, fractions = config.iteration_dtype, config.ns_method in FLOAT32_METHODS
    matrix, total = held["matrix"], held["total"]
    stored = {label: _storage_text(config, report, label) for label in breakdown.LABELS}
    lines = [
        "Optimizer configuration",
        f"  Muon variant:      {variant_title(config)}",
        f"  Memory reduction:  {_reduction(matrix['reduction'])}",
        f"  Details:           FP32 {megabytes(matrix['fp32_muon_bytes'])} -> "
        f"{megabytes(matrix['state_bytes'])} ({stored['matrix']})",
        f"  Orthogonalised by: {config.ns_method}, {config.ns_steps} "
        f"{'poles' if fractions else 'steps'} in {resolve_dtype(dtype)}"
        f"{' (auto)' if dtype == 'auto' else ''}",
        *(_galore_lines(config, report) if config.use_galore else ()),
        "  Whole optimizer:   FP32 Muon + AdamW "
        f"{megabytes(total['fp32_muon_adamw_bytes'])} -> "
        f"{megabytes(total['state_bytes'])}, {_less(total['reduction'])}",
        *(
            f"  {label.capitalize() + ':':<18} {stored[label]}"
            for label in breakdown.LABELS[1:]
            if labels and stored[label]
        ),
    ]
    fill = functools.partial(textwrap.fill, width=80, subsequent_indent=" " * 21)
    return "\n".join(map(fill, lines))


def _reduction(part: float) -> str:
    """Returns a reduction of Muon's state in words; preconditioning makes it larger."""
    if round(part, 3) < 0:
        return f"none, {_less(part)} than FP32 Muon's state"
    return f"{100 * part:z.1f} % of FP32 Muon's state"


def _less(part: float) -> str:
    return f"{100 * abs(part):z.1f} % {'more' if round(part, 3) < 0 else 'less'}"


def group_table(groups: list[dict[str, Any]]) -> Group:
    """Returns the parameter groups as a table, and their members below it.

    Args:
      groups: The groups, from `breakdown.parameter_groups`.
    """
    table = Table(title="Parameter groups", title_justify="left", box=SIMPLE_HEAD)
    for name in ("label", "optimizer"):
        table.add_column(name)
    for name in ("peak lr", "params", "state"):
        table.add_column(name, justify="right")
    table.add_column("stored as")
    members = Table.grid(padding=(0, 2))
    for group in groups:
        name = " ".join(filter(None, (group["label"], group.get("match"))))
        stored = (f"{field} {name}" for field, name in group["storage"].items())
        table.add_row(
            name,
            group["optimizer"],
            f"{group['lr']:g}",
            f"{group['params']:,}",
            megabytes(group["state_bytes"]),
            "\n".join(stored),
        )
        members.add_row(f"  {name}", "\n".join(group["paths"]))
    return Group(table, members, "")


def rank_table(config: Config, params: optax.Params) -> Table:
    """Returns the state of the matrices at the ranks of the hardware presets.

    Args:
      config: Settings of the run.
      params: Shapes and types of its parameters.
    """
    title = "Matrix state by GaLore rank"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("hardware", "rank", "state", "of FP32 Muon", "left at full rank"):
        table.add_column(name, justify="right")
    total = jax.tree.leaves(label_params(params)).count("matrix")
    for hardware, rank in sorted(HARDWARE_RANKS.items(), key=lambda item: item[1]):
        other = dataclasses.replace(config, galore_rank=rank)
        report = memory_report(build_optimizer(other, params), params)
        table.add_row(
            hardware,
            str(rank),
            megabytes(report.matrix_bytes),
            f"{100 * report.matrix_bytes / report.fp32_muon_bytes:.1f} %",
            f"{len(report.full_rank)} of {total}",
        )
    return table


def flops_summary(config: Config, flops: dict[str, float]) -> str:
    """Returns the operations of a training step in words.

    Args:
      config: Settings of the run.
      flops: Operations by part, from `breakdown.step_flops`.
    """
    giga = lambda name: f"{flops[name] / 1e9:,.0f} GFLOP"
    lines = [
        f"Operations of a step of {config.tokens_per_step:,} tokens:",
        f"  forward and backward {giga('model')}",
        f"  update {giga('update')}, {100 * flops['update_share']:.1f} % of all "
        f"({config.ns_method})",
    ]
    newton_schulz = config.ns_method not in FLOAT32_METHODS
    if newton_schulz and resolve_dtype(config.ns_dtype) != "bfloat16":
        lines.append(
            f"  in the Gram form where a side is over {GRAM_RATIO} times the other"
        )
    return "\n".join(lines)


def _storage_text(config: Config, report: MemoryReport, label: str) -> str:
    stored = breakdown.storage(config, report, label)
    return ", ".join(f"{field} {name}" for field, name in stored.items())


def _galore_lines(config: Config, report: MemoryReport) -> list[str]:
    rest = (
        f", complement at weight {config.galore_residual:g}"
        if config.galore_residual
        else ""
    )
    return [
        f"  GaLore rank {config.rank}, refreshed every "
        f"{config.galore_update_freq} steps{rest}",
        *(
            f"  Left at full rank: {name}, where projecting saves nothing"
            for name in breakdown.pattern_counts(report.full_rank)
        ),
    ]
