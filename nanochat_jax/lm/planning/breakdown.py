"""Groups, storage and operations of an optimizer, as numbers and names."""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from nanochat_jax.config import Config, OptimizerConfig
from nanochat_jax.lm.model import count_flops_per_token, kernel_axes
from nanochat_jax.optimizer import (
    MemoryReport,
    Rule,
    fallback_codecs,
    in_group,
    roles,
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
    found = roles.settle(
        params, matrix_axes=kernel_axes, freeze=config.freeze, groups=config.groups
    )
    matches = {group.match: number for number, group in enumerate(config.groups)}
    members: dict[tuple[int, int], list[Any]] = {}
    for path, x in jax.tree.leaves_with_path(params):
        role = found[keystr(path)]
        number = matches[role.group.match] if role.group else -1
        place = ((*LABELS, "frozen").index(role.label), number)
        members.setdefault(place, []).append((path, x))
    return [
        _group(config, report, found[keystr(leaves[0][0])], leaves)
        for _, leaves in sorted(members.items(), key=lambda item: item[0])
    ]


def _group(
    config: Config, report: MemoryReport, role: roles.Role, leaves: list[Any]
) -> dict[str, Any]:
    """Returns facts about parameters of one label that are in one group, or in none."""
    matrix, frozen = role.label == "matrix", role.label == "frozen"
    numbers = in_group(config, Rule.of(config), role.group, decays=role.decays)
    settings, rule = numbers
    rate = config.lr if matrix else settings.fallback_peak_lr
    rate = role.group.lr if role.group and role.group.lr is not None else rate
    decay = rule.decay if matrix else rule.fallback_decay
    dotted = lambda path: keystr(path, simple=True, separator=".")
    return {
        "label": role.label,
        **({"match": role.group.match} if role.group else {}),
        "optimizer": "none"
        if frozen
        else (config.variant if matrix else settings.fallback),
        "lr": 0.0 if frozen else rate,
        "weight_decay": 0.0 if frozen else decay,
        "params": sum(x.size for _, x in leaves),
        "state_bytes": sum(
            report.leaf_bytes.get(keystr(path), 0) for path, _ in leaves
        ),
        "storage": storage(settings, report, role.label),
        "paths": pattern_counts(
            f"{dotted(path)} {'x'.join(map(str, x.shape))}" for path, x in leaves
        ),
    }


def storage(
    config: OptimizerConfig, report: MemoryReport, label: str
) -> dict[str, str]:
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
