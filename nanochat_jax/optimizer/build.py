"""Muon for matrices, AdamW or Lion for the rest, as a configuration asks.

`build_optimizer` only assembles transforms. For `use_8bit_optim` and `use_galore` both:

    partition(
        matrix: quantize_state(chain(galore(momentum, residual), orthogonalize))
                -> scale_by_shape -> weight decay -> learning rate,
        embedding, head, vector: quantize_state(AdamW))

Where groups give numbers of their own, `by_group` runs one such chain for each.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.tree_util import keystr

from nanochat_jax.config import OptimizerConfig
from nanochat_jax.interop import as_arrays, for_nnx
from nanochat_jax.optimizer.chains import (
    fallback_optimizer,
    fields_of,
    has_short,
    matrix_optimizer,
)
from nanochat_jax.optimizer.groups import by_group
from nanochat_jax.optimizer.notes import note_of, part_of
from nanochat_jax.optimizer.roles import Role, Roles, partition_by_role, settle
from nanochat_jax.optimizer.rule import Rule, alike, in_group
from nanochat_jax.optimizer.sharding import distribute, shardings_of
from nanochat_jax.transforms import (
    clip_by_global_norm,
    stages,
)

_PARTS = ("matrix", "embedding", "head", "vector")


def build_optimizer(
    config: OptimizerConfig,
    params: optax.Params,
    labels: Any = None,
    matrix_axes: Any = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer that `config` asks for.

    Example:
      >>> params = {"block": {"kernel": jnp.zeros((256, 512)), "bias": jnp.zeros(512)}}
      >>> config = OptimizerConfig(use_8bit_optim=True, use_galore=True, galore_rank=64)
      >>> tx = build_optimizer(config, params)
      >>> state = tx.init(params)

    Args:
      config: Settings of the optimizer.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s. If they are sharded over
        several devices, the optimizer is made to `distribute` its work over these.
      labels: Labels that override all others: a tree like `params`, or a prefix of
        it, of `"matrix"`, `"embedding"`, `"head"`, `"vector"` and `"frozen"`, or a
        function from parameters to one; names and modules decide where it has `None`.
      matrix_axes: The axes of matrices where names do not tell, as for `as_matrices`,
        or what `matrix_axes(model)` returned.
      learning_rate: Learning rate of the matrices, or a schedule, in place of `lr` and
        its schedule; an argument, as `optax.inject_hyperparams` needs.

    Returns:
      An Optax transformation, from gradients to updates.

    Raises:
      TypeError: If a parameter is complex.
      ValueError: If nothing tells which axes of a leaf are a matrix, or a pattern of
        `freeze` or a group matches no parameter.
    """
    params = as_arrays(params)
    roles = settle(
        params,
        labels=labels,
        matrix_axes=matrix_axes,
        freeze=config.freeze,
        groups=config.groups,
    )
    rule = Rule.of(config)
    if learning_rate is not None:
        rule = dataclasses.replace(rule, rate=learning_rate)
    known = lambda tree: _require_known(roles, tree)
    tx = assemble(config, rule, known, has_short(params))
    shardings = shardings_of(params)
    # `init` may be given the variables of `flax.nnx`, which shardings do not mirror.
    return tx if shardings is None else for_nnx(distribute(tx, shardings))


def assemble(
    config: OptimizerConfig,
    rule: Rule,
    settle: Callable[[optax.Params], Roles],
    short: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Puts the transforms of a configuration together.

    Args:
      config: Settings of the optimizer, except for the numbers in `rule`.
      rule: Rates, decays and betas.
      settle: Function from parameters to the role of each, by path.
      short: Whether updates land on bfloat16 parameters as the configuration says.
    """
    clip = lambda by_label: stages(
        clip=clip_by_global_norm(config.grad_clip), by_label=by_label
    )
    return partition_by_role(
        functools.partial(_optimizers, config, rule, short),
        settle,
        clip if config.grad_clip else lambda by_label: by_label,
        functools.partial(part_of, config),
        functools.partial(note_of, config, rule),
        fields_of(config),
    )


def _optimizers(
    config: OptimizerConfig, rule: Rule, short: bool, roles: Roles
) -> dict[str, optax.GradientTransformation]:
    """Returns the optimizers of roles, by the keys of their states."""
    named = {group.optimizer or "muon" for group in config.groups}
    parts = (*_PARTS, *sorted(named - {"muon", config.fallback}))
    by_part: dict[str, dict[str, Role]] = {part: {} for part in parts}
    for path, role in roles.items():
        if role.label != "frozen":
            by_part[part_of(config, role)][path] = role
    return {
        part: _of_part(config, rule, short, part, members)
        for part, members in by_part.items()
    }


def _of_part(
    config: OptimizerConfig, rule: Rule, short: bool, part: str, members: Roles
) -> optax.GradientTransformation:
    """Returns the optimizer of a part, with the numbers of every group in it."""
    names = {path: role.numbers for path, role in members.items()}
    roles = {names[path]: role for path, role in members.items()}
    settings = {
        name: in_group(config, rule, role.group, decays=role.decays)
        for name, role in roles.items()
    }
    if not settings:
        settings = {None: in_group(config, rule, None, decays=part != "vector")}
    rules = alike({name: rule for name, (_, rule) in settings.items()})
    # Matrices may be among vectors, and are worked on by rows as embeddings are.
    by_rows = part != "vector" or any(role.usual for role in members.values())
    make = lambda name: (
        matrix_optimizer(settings[name][0], rules[name], short)
        if part == "matrix"
        else fallback_optimizer(settings[name][0], rules[name], short, part, by_rows)
    )
    return by_group({name: make(name) for name in settings}, names)


def _require_known(roles: Roles, tree: Any) -> Roles:
    """Returns the roles, if they are of the parameters of a tree."""
    names = [keystr(path) for path, _ in jax.tree.leaves_with_path(tree)]
    unknown = [name for name in names if name not in roles]
    if unknown:
        raise ValueError(
            "the optimizer was built for other parameters, which lack\n  "
            + "\n  ".join(unknown)
            + "\nGive `build_optimizer` the parameters that it is used with."
        )
    return roles
