"""What a run prints about its optimizer before it trains; every number is counted."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from nanochat_jax.config import HARDWARE_RANKS, Config
from nanochat_jax.lm.model import (
    build_optimizer,
    count_flops_per_token,
    kernel_axes,
    label_params,
)
from nanochat_jax.numerics import GRAM_RATIO, resolve_dtype
from nanochat_jax.optimizer import (
    MemoryReport,
    fallback_codecs,
    memory_report,
    state_codecs,
    update_flops,
)

_LABELS = ("matrix", "embedding", "head", "vector")


def megabytes(count: float) -> str:
    """Returns a number of bytes in MB, 10⁶ bytes."""
    return f"{count / 1e6:.1f} MB"


def variant_title(config: Config) -> str:
    """Returns the Muon variant in words, such as `"GaLore 2 + 8-bit Muon"`."""
    muon = f"{config.quant_bits}-bit Muon" if config.use_8bit_optim else "Muon"
    return f"GaLore 2 + {muon}" if config.use_galore else muon


def optimizer_summary(config: Config, report: MemoryReport) -> str:
    """Returns the lines about the optimizer that a run begins with."""
    held = report.to_dict()
    matrix, total = held["matrix"], held["total"]
    stored = {label: _storage_text(config, report, label) for label in _LABELS}
    lines = [
        "Optimizer configuration",
        f"  Muon variant:      {variant_title(config)}",
        f"  Memory reduction:  {100 * matrix['reduction']:z.1f} % of FP32 Muon's state",
        f"  Details:           FP32 {megabytes(matrix['fp32_muon_bytes'])} -> "
        f"{megabytes(matrix['state_bytes'])} ({stored['matrix']})",
        f"  Newton-Schulz:     {config.ns_method}, {config.ns_steps} steps in "
        f"{resolve_dtype(config.ns_dtype)}"
        f"{' (auto)' if config.ns_dtype == 'auto' else ''}",
        *(_galore_lines(config, report) if config.use_galore else ()),
        "  Whole optimizer:   FP32 Muon + AdamW "
        f"{megabytes(total['fp32_muon_adamw_bytes'])} -> "
        f"{megabytes(total['state_bytes'])}, {100 * total['reduction']:z.1f} % less",
        *(
            f"  {label.capitalize() + ':':<18} {stored[label]}"
            for label in _LABELS[1:]
            if stored[label]
        ),
    ]
    return "\n".join(lines)


def storage(config: Config, report: MemoryReport, label: str) -> dict[str, str]:
    """Returns how the state of the parameters of a label is stored, by field.

    Args:
      config: What the optimizer is.
      report: What it holds.
      label: Label of the parameters.

    Returns:
      Names of codecs or types, such as `{"momentum": "int8", "projector": "float32"}`;
      both, where small arrays are left as they are.
    """
    codecs = (state_codecs if label == "matrix" else fallback_codecs)(config)
    names: dict[str, list[str]] = {}
    for row in report.rows:
        if row.label != label or row.field.endswith(".scales"):
            continue
        coded = row.field in codecs and jnp.dtype(row.dtype).itemsize == 1
        name = codecs[row.field].name if coded else row.dtype
        names.setdefault(row.field, []).append(name)
    return {field: " and ".join(names[field]) for field in sorted(names)}


def parameter_groups(
    config: Config, params: optax.Params, report: MemoryReport
) -> list[dict[str, Any]]:
    """Returns, by label, how parameters are optimised and what is held for them."""
    labels = jax.tree.leaves(label_params(params))
    dotted = lambda path: keystr(path, simple=True, separator=".")
    paths = [(dotted(path), x) for path, x in jax.tree.leaves_with_path(params)]
    groups = []
    for label in _LABELS:
        members = [p for p, found in zip(paths, labels, strict=True) if found == label]
        if not members:
            continue
        matrix = label == "matrix"
        groups.append(
            {
                "label": label,
                "optimizer": config.variant if matrix else config.fallback,
                "lr": config.lr if matrix else config.fallback_peak_lr,
                "weight_decay": 0.0 if label == "vector" else config.weight_decay,
                "params": sum(x.size for _, x in members),
                "state_bytes": sum(r.bytes for r in report.rows if r.label == label),
                "storage": storage(config, report, label),
                "paths": _pattern_counts(
                    f"{name} {'x'.join(map(str, x.shape))}" for name, x in members
                ),
            }
        )
    return groups


def group_table(groups: list[dict[str, Any]]) -> Group:
    """Returns the parameter groups as a table, and below it what is in each."""
    table = Table(title="Parameter groups", title_justify="left", box=SIMPLE_HEAD)
    for name in ("label", "optimizer"):
        table.add_column(name)
    for name in ("peak lr", "params", "state"):
        table.add_column(name, justify="right")
    table.add_column("stored as")
    members = Table.grid(padding=(0, 2))
    for group in groups:
        stored = (f"{field} {name}" for field, name in group["storage"].items())
        table.add_row(
            group["label"],
            group["optimizer"],
            f"{group['lr']:g}",
            f"{group['params']:,}",
            megabytes(group["state_bytes"]),
            "\n".join(stored),
        )
        members.add_row(f"  {group['label']}", "\n".join(group["paths"]))
    return Group(table, members, "")


def rank_table(config: Config, params: optax.Params) -> Table:
    """Returns what the ranks of the hardware presets would hold for the matrices."""
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


def step_flops(config: Config, params: optax.Params) -> dict[str, float]:
    """Returns the operations of a training step, and the update's share of them."""
    parts = update_flops(config, params, matrix_axes=kernel_axes)
    model = count_flops_per_token(config, config.sequence) * config.tokens_per_step
    update = sum(parts.values())
    return {
        "model": model,
        "update": update,
        **{f"update_{name}": count for name, count in parts.items()},
        "update_share": update / (update + model),
    }


def flops_summary(config: Config, flops: dict[str, float]) -> str:
    """Returns the operations of a training step in words."""
    giga = lambda name: f"{flops[name] / 1e9:,.0f} GFLOP"
    lines = [
        f"Operations of a step of {config.tokens_per_step:,} tokens:",
        f"  forward and backward {giga('model')}",
        f"  update {giga('update')}, {100 * flops['update_share']:.1f} % of all "
        f"({config.ns_method} Newton-Schulz)",
    ]
    if resolve_dtype(config.ns_dtype) != "bfloat16":
        lines.append(
            f"  in the Gram form where a side is over {GRAM_RATIO} times the other"
        )
    return "\n".join(lines)


def _storage_text(config: Config, report: MemoryReport, label: str) -> str:
    stored = storage(config, report, label)
    return ", ".join(f"{field} {name}" for field, name in stored.items())


def _galore_lines(config: Config, report: MemoryReport) -> list[str]:
    rest = (
        f", the rest of the gradient at weight {config.galore_residual:g}"
        if config.galore_residual
        else ""
    )
    return [
        f"  GaLore rank {config.rank}, refreshed every "
        f"{config.galore_update_freq} steps{rest}",
        *(
            f"  Left at full rank: {name}, where projecting saves nothing"
            for name in _pattern_counts(report.full_rank)
        ),
    ]


def accumulator_summary(config: Config, held: dict[str, int]) -> str:
    """Returns in words what gradients are added up in over microbatches."""
    line = f"Gradient accumulator: {megabytes(held['usual'])}"
    if config.accumulates_low_rank:
        return (
            f"{line} in the low-rank space, {megabytes(held['refresh'])} on the steps "
            "that change the bases."
        )
    if config.use_galore:
        line += (
            "; low-rank with `galore_residual`, `grad_clip` 0 and neither "
            "`galore_stagger` nor `galore_adaptive`"
        )
    return f"{line}."


def _pattern_counts(names: Any) -> list[str]:
    """Returns names with layer numbers starred, each once with how often it occurs."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    return [
        f"{count} x {name}" if count > 1 else name for name, count in counts.items()
    ]
