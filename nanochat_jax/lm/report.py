"""What a run prints about its optimizer before it trains; every number is counted."""

import dataclasses
import re
from typing import Any

import jax
import optax
from jax.tree_util import keystr
from rich.table import Table

from nanochat_jax.config import HARDWARE_RANKS, Config
from nanochat_jax.flops import update_flops
from nanochat_jax.labels import label_params
from nanochat_jax.linalg import GRAM_RATIO, resolve_dtype
from nanochat_jax.lm.model import count_flops_per_token
from nanochat_jax.memory import MemoryReport, memory_report
from nanochat_jax.optimizer import build_optimizer, state_codecs

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
    held = report.to_dict()["matrix"]
    stored = {"momentum": "float32"}
    if config.use_galore:
        bits = config.stored_projector_bits
        stored["projector"] = {16: "bfloat16"}.get(bits, "float32")
    stored |= {field: codec.name for field, codec in state_codecs(config).items()}
    details = ", ".join(f"{field} {name}" for field, name in stored.items())
    lines = [
        "Optimizer configuration",
        f"  Muon variant:      {variant_title(config)}",
        f"  Memory reduction:  {100 * held['reduction']:.1f} % of FP32 Muon's state",
        f"  Details:           FP32 {megabytes(held['fp32_muon_bytes'])} -> "
        f"{megabytes(held['state_bytes'])} ({details})",
    ]
    lines.append(
        f"  Newton-Schulz:     {config.ns_method}, {config.ns_steps} steps in "
        f"{resolve_dtype(config.ns_dtype)}"
        f"{' (auto)' if config.ns_dtype == 'auto' else ''}"
    )
    if config.use_galore:
        rest = (
            f", the rest of the gradient at weight {config.galore_residual:g}"
            if config.galore_residual
            else ""
        )
        lines.append(
            f"  GaLore rank {config.rank}, refreshed every "
            f"{config.galore_update_freq} steps{rest}"
        )
        lines += [
            f"  Left at full rank: {name}, where projecting saves nothing"
            for name in _pattern_counts(report.full_rank)
        ]
    lines.append(
        "  Whole optimizer:   FP32 Muon + AdamW "
        f"{megabytes(report.fp32_muon_adamw_bytes)} -> {megabytes(report.total_bytes)}"
    )
    return "\n".join(lines)


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
                "paths": _pattern_counts(
                    f"{name} {'x'.join(map(str, x.shape))}" for name, x in members
                ),
            }
        )
    return groups


def group_table(groups: list[dict[str, Any]]) -> Table:
    """Returns the parameter groups as a table."""
    table = Table(title="Parameter groups", title_justify="left")
    table.add_column("label")
    table.add_column("optimizer")
    for name in ("peak lr", "params", "state"):
        table.add_column(name, justify="right")
    table.add_column("paths")
    for group in groups:
        table.add_row(
            group["label"],
            group["optimizer"],
            f"{group['lr']:g}",
            f"{group['params']:,}",
            megabytes(group["state_bytes"]),
            "\n".join(group["paths"]),
        )
    return table


def rank_table(config: Config, params: optax.Params) -> Table:
    """Returns what the ranks of the hardware presets would hold for the matrices."""
    table = Table(title="Matrix state by GaLore rank", title_justify="left")
    for name in ("hardware", "rank", "state", "of FP32 Muon", "left at full rank"):
        table.add_column(name, justify="right")
    total = jax.tree.leaves(label_params(params)).count("matrix")
    for hardware, rank in sorted(HARDWARE_RANKS.items(), key=lambda item: item[1]):
        other = dataclasses.replace(config, galore_rank=rank)
        report = memory_report(build_optimizer(other, params), params)
        total = len(
            [row for row in jax.tree.leaves(label_params(params)) if row == "matrix"]
        )
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
    parts = update_flops(config, params)
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
    forms = (
        ""
        if resolve_dtype(config.ns_dtype) == "bfloat16"
        else (f", in the Gram form where a side is over {GRAM_RATIO} times the other")
    )
    return (
        f"Operations of a step: {flops['model'] / 1e9:,.0f} GFLOP forward and backward "
        f"over {config.tokens_per_step:,} tokens, {flops['update'] / 1e9:,.0f} GFLOP "
        f"to update, {100 * flops['update_share']:.1f} % of all "
        f"({config.ns_method} Newton-Schulz{forms})."
    )


def _pattern_counts(names: Any) -> list[str]:
    """Returns names with layer numbers starred, each once with how often it occurs."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    return [
        f"{count} x {name}" if count > 1 else name for name, count in counts.items()
    ]
