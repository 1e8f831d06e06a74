"""Groups, storage and operations of an optimizer, as numbers and names."""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from nanochat_jax.config import Config
from nanochat_jax.lm.model import count_flops_per_token, kernel_axes
from nanochat_jax.optimizer import (
    MemoryReport,
    fallback_codecs,
    label_params,
    state_codecs,
    update_flops,
)

LABELS = ("matrix", "embedding", "head", "vector")
"""Labels of trained parameters, in the order of reports."""


def parameter_groups(
    config: Config, params: optax.Params, report: MemoryReport
) -> list[dict[str, Any]]:
    """Returns optimizer, rates, state and members of each label's parameters.

    Args:
      config: Settings of the run.
      params: Shapes and types of its parameters.
      report: Memory of its optimizer.
    """
    labels = jax.tree.leaves(
        label_params(params, matrix_axes=kernel_axes, freeze=config.freeze)
    )
    dotted = lambda path: keystr(path, simple=True, separator=".")
    paths = [(dotted(path), x) for path, x in jax.tree.leaves_with_path(params)]
    groups = []
    for label in (*LABELS, "frozen"):
        members = [p for p, found in zip(paths, labels, strict=True) if found == label]
        if not members:
            continue
        matrix, frozen = label == "matrix", label == "frozen"
        optimizer = config.variant if matrix else config.fallback
        rate = config.lr if matrix else config.fallback_peak_lr
        decays = label not in ("vector", "frozen")
        groups.append(
            {
                "label": label,
                "optimizer": "none" if frozen else optimizer,
                "lr": 0.0 if frozen else rate,
                "weight_decay": config.weight_decay if decays else 0.0,
                "params": sum(x.size for _, x in members),
                "state_bytes": sum(r.bytes for r in report.rows if r.label == label),
                "storage": storage(config, report, label),
                "paths": pattern_counts(
                    f"{name} {'x'.join(map(str, x.shape))}" for name, x in members
                ),
            }
        )
    return groups


def storage(config: Config, report: MemoryReport, label: str) -> dict[str, str]:
    """Returns how the state of the parameters of a label is stored, by field.

    Args:
      config: Settings of the optimizer.
      report: Its memory.
      label: Label of the parameters.

    Returns:
      Names of codecs or types, such as `{"momentum": "int8", "basis": "float32"}`;
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


def step_flops(config: Config, params: optax.Params) -> dict[str, float]:
    """Returns the operations of a training step, and the update's share of them.

    Args:
      config: Settings of the run.
      params: Shapes and types of its parameters.
    """
    parts = update_flops(config, params, matrix_axes=kernel_axes)
    model = count_flops_per_token(config, config.sequence) * config.tokens_per_step
    update = sum(parts.values())
    return {
        "model": model,
        "update": update,
        **{f"update_{name}": count for name, count in parts.items()},
        "update_share": update / (update + model),
    }


def pattern_counts(names: Iterable[str]) -> list[str]:
    """Returns names with `*` for layer numbers, each once with its count.

    Args:
      names: Names with dots.
    """
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    return [
        f"{count} x {name}" if count > 1 else name for name, count in counts.items()
    ]
