"""Muon for matrices, AdamW or Lion for the rest, as a configuration asks.

`build_optimizer` only assembles transforms. For `use_8bit_optim` and `use_galore` both:

    partition(
        matrix: quantize_state(chain(galore(momentum, residual), orthogonalize))
                -> scale_by_shape -> weight decay -> learning rate,
        embedding, head, vector: quantize_state(AdamW))
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from nanochat_jax.codecs import Codec
from nanochat_jax.config import OptimizerConfig
from nanochat_jax.interop import as_arrays, for_nnx
from nanochat_jax.numerics import POLYNOMIALS
from nanochat_jax.optimizer.notes import notes_of
from nanochat_jax.optimizer.roles import Roles, partition_by_role, settle
from nanochat_jax.optimizer.rule import Rule
from nanochat_jax.optimizer.sharding import distribute, shardings_of
from nanochat_jax.optimizer.storage import fallback_codecs, projects, state_codecs
from nanochat_jax.transforms import (
    RandomizedSVD,
    applying,
    clip_by_global_norm,
    galore,
    in_float32,
    momentum,
    orthogonalize,
    quantize_state,
    round_updates,
    scale_by_shape,
    sequence,
    split_master,
    stages,
    widened,
)

# Rows of a quantised embedding that are decoded at a time, in float32: 2 MiB.
_ROW_BYTES = 1 << 21


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
        `freeze` matches no parameter.
    """
    params = as_arrays(params)
    roles = settle(params, labels=labels, matrix_axes=matrix_axes, freeze=config.freeze)
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
    optimizers = {
        "matrix": matrix_optimizer(config, rule, short),
        "embedding": _table_optimizer(config, rule, short),
        "head": _table_optimizer(config, rule, short),
        "vector": landing(_vector_optimizer(config, rule), config, short),
    }
    clip = lambda by_label: stages(
        clip=clip_by_global_norm(config.grad_clip), by_label=by_label
    )
    around = clip if config.grad_clip else lambda by_label: by_label
    return partition_by_role(optimizers, settle, around, lambda: notes_of(config, rule))


def matrix_optimizer(
    config: OptimizerConfig, rule: Rule | None = None, short: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Builds the Muon variant that `config` asks for, for trees of matrices only.

    Args:
      config: Settings of the optimizer.
      rule: Rates, decays and betas; from `config` if not given.
      short: As for `assemble`.
    """
    rule = Rule.of(config) if rule is None else rule
    chain = stages(
        direction=_direction(config, rule),
        shape=scale_by_shape(config.muon_scale),
        decay=optax.add_decayed_weights(rule.decay),
        rate=optax.scale_by_learning_rate(rule.rate),
    )
    return sequence(landing(in_float32(chain), config, short), core_ndim=2)


def _direction(config: OptimizerConfig, rule: Rule) -> optax.GradientTransformation:
    """Nests momentum, orthogonalisation, low-rank space and storage."""
    average = momentum(
        rule.beta, nesterov=rule.nesterov, bias_correction=rule.bias_correction
    )
    polynomials = POLYNOMIALS[config.ns_method].take(config.ns_steps)
    step = orthogonalize(polynomials, dtype=config.ns_dtype)
    if not config.use_galore:
        tx = optax.chain(average, step)
    elif config.galore_residual:
        tx = optax.chain(_galore(average, config), step)
    else:
        tx = _galore(optax.chain(average, step), config)
    return _quantized(tx, state_codecs(config), config)


def _galore(
    inner: optax.GradientTransformation, config: OptimizerConfig
) -> optax.GradientTransformation:
    basis = RandomizedSVD(
        config.galore_update_freq,
        # Without quantisation the update depends on the space alone, not on its basis.
        aligned=config.use_8bit_optim,
        seed=config.seed,
    )
    return galore(
        inner,
        config.rank,
        complement=_complement(config),
        basis=basis,
        project=projects(config),
    )


def _complement(config: OptimizerConfig) -> float | optax.GradientTransformation:
    if not config.galore_rest_bits:
        return config.galore_residual
    average = momentum(config.galore_rest_momentum)
    if config.galore_residual == 1:
        return average
    return optax.chain(average, optax.scale(config.galore_residual))


def _quantized(
    tx: optax.GradientTransformation,
    codecs: dict[str, Codec],
    config: OptimizerConfig,
) -> optax.GradientTransformation:
    if not codecs:
        return tx
    return quantize_state(tx, codecs, min_size=config.quant_min_size, seed=config.seed)


def has_short(params: optax.Params) -> bool:
    """Returns whether parameters are bfloat16, any of them."""
    return any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))


def landing(
    tx: optax.GradientTransformation, config: OptimizerConfig, short: bool
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer whose updates land on parameters as a configuration says.

    Args:
      tx: The optimizer.
      config: Settings of the optimizer.
      short: Whether parameters are bfloat16.
    """
    links = {
        "stochastic": lambda: round_updates(config.seed),
        "split": lambda: split_master(config.master_bits),
    }
    if not short or config.weight_rounding not in links:
        return applying(tx)
    # Gradients are widened first, since updates come back in their type.
    wide = optax.stateless(lambda updates, _: widened(updates))
    return applying(
        stages(wide=wide, update=tx, weights=links[config.weight_rounding]())
    )


def _table_optimizer(
    config: OptimizerConfig, rule: Rule, short: bool
) -> optax.GradientTransformation:
    """Builds the optimizer of embeddings and head."""
    tx = _fallback(config, rule, rule.fallback_decay)
    codecs = fallback_codecs(config) if config.quantize_embeddings else {}
    tx = landing(_quantized(tx, codecs, config), config, short)
    if not codecs and not short:
        return tx
    return sequence(tx, max_bytes=_ROW_BYTES, core_ndim=1)


def _vector_optimizer(
    config: OptimizerConfig, rule: Rule
) -> optax.GradientTransformation:
    return _quantized(_fallback(config, rule, 0.0), fallback_codecs(config), config)


def _fallback(
    config: OptimizerConfig, rule: Rule, weight_decay: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    rate, (b1, b2) = rule.fallback_rate, rule.fallback_betas
    if config.fallback == "lion":
        return in_float32(optax.lion(rate, b1, b2, weight_decay=weight_decay))
    tx = optax.adamw(
        rate, b1, b2, weight_decay=weight_decay, nesterov=rule.fallback_nesterov
    )
    return in_float32(tx)


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
