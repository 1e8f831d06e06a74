"""Chains of transforms for one part of the parameters: Muon, AdamW or Lion."""

import jax
import jax.numpy as jnp
import optax

from nanochat_jax.codecs import Codec
from nanochat_jax.config import OptimizerConfig
from nanochat_jax.numerics import method_of
from nanochat_jax.optimizer.rule import Rule
from nanochat_jax.optimizer.storage import (
    average_codecs,
    fallback_codecs,
    projects,
    state_codecs,
)
from nanochat_jax.transforms import (
    PowerStep,
    RandomizedSVD,
    applying,
    average_weights,
    decay_weights,
    fix_norms,
    floor_updates,
    galore,
    in_float32,
    momentum,
    normalize_rows,
    orthogonalize,
    owned,
    precondition,
    quantize_state,
    round_updates,
    scale_by_shape,
    sequence,
    split_master,
    stages,
    widened,
)

# Arrays of the state of a square matrix: momentum, and what `precondition` adds to it.
_FIELDS = {None: 1, "short": 4, "both": 6}
# Rows of a quantised embedding that are decoded at a time, in float32: 2 MiB.
_ROW_BYTES = 1 << 21


def matrix_optimizer(
    config: OptimizerConfig, rule: Rule | None = None, short: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Builds the Muon variant that `config` asks for, for trees of matrices only.

    Args:
      config: Settings of the optimizer.
      rule: Rates, decays and betas; from `config` if not given.
      short: Whether updates land on bfloat16 parameters as the configuration says.
    """
    rule = Rule.of(config) if rule is None else rule
    parts: dict[str, optax.GradientTransformation] = {
        "direction": _direction(config, rule)
    }
    if config.normalize_rows in ("normuon", "muon_plus"):
        running = config.normalize_rows == "normuon"
        beta = config.normuon_beta if running else None
        parts["neurons"] = normalize_rows(beta=beta)
    parts["shape"] = scale_by_shape(config.muon_scale)
    if config.update_floor:
        parts["floor"] = floor_updates(config.update_floor)
    if config.row_floor:
        parts["row_floor"] = floor_updates(config.row_floor, by="neuron")
    parts["decay"] = decay_weights(rule.decay, cautious=config.cautious_decay)
    parts["rate"] = optax.scale_by_learning_rate(rule.rate)
    if config.fixed_norm:
        parts["norm"] = fix_norms()
    chain = in_float32(stages(**parts))
    tx = landing(chain, config, short, rule.average)
    return sequence(
        tx,
        core_ndim=2,
        fields=fields_of(config),
        alike=lambda path, shape: len(shape) == 2 or None,
    )


def fields_of(config: OptimizerConfig) -> int:
    """Returns the number of arrays of the state of a square matrix."""
    return _FIELDS[config.precondition]


def _direction(config: OptimizerConfig, rule: Rule) -> optax.GradientTransformation:
    """Nests momentum, orthogonalisation, low-rank space and storage."""
    average = momentum(
        rule.beta, nesterov=rule.nesterov, bias_correction=rule.bias_correction
    )
    if config.precondition:
        average = precondition(
            average,
            sides=config.precondition,
            beta=config.precondition_beta,
            moment_beta=config.precondition_beta,
            basis=PowerStep(config.precondition_every),
        )
    method = method_of(config.ns_method, config.ns_steps)
    step = orthogonalize(method, dtype=config.iteration_dtype)
    if config.normalize_rows == "muon_eq":
        step = optax.chain(normalize_rows(), step)
    if not config.use_galore:
        tx = optax.chain(average, step)
    elif config.galore_residual:
        tx = optax.chain(_galore(average, config), step)
    else:
        tx = _galore(optax.chain(average, step), config)
    tx = _quantized(tx, state_codecs(config), config)
    # Bases are found from whole matrices, which each device is sent once.
    return owned(tx, dtype=config.iteration_dtype) if config.use_galore else tx


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
    tx: optax.GradientTransformation,
    config: OptimizerConfig,
    short: bool,
    average: tuple[int, int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer whose updates land on parameters as a configuration says.

    The average of weights, if there is one, is of weights as they are stored.

    Args:
      tx: The optimizer.
      config: Settings of the optimizer.
      short: Whether parameters are bfloat16.
      average: Start and horizon of the average of weights, if there is one.
    """
    links = {
        "stochastic": lambda: round_updates(config.seed),
        "split": lambda: split_master(config.master_bits),
    }
    parts = {"update": tx}
    if short and config.weight_rounding in links:
        # Gradients are widened first, since updates come back in their type.
        wide = optax.stateless(lambda updates, _: widened(updates))
        weights = links[config.weight_rounding]()
        parts = {"wide": wide, **parts, "weights": weights}
    if average:
        kept = average_weights(*average)
        parts["average"] = _quantized(kept, average_codecs(config), config)
    return applying(tx if len(parts) == 1 else stages(**parts))


def fallback_optimizer(
    config: OptimizerConfig, rule: Rule, short: bool, part: str, by_rows: bool
) -> optax.GradientTransformation:
    """Builds AdamW or Lion for a part of the parameters.

    Args:
      config: Settings of the optimizer.
      rule: Rates, decays and betas.
      short: As for `matrix_optimizer`.
      part: Key of its state.
      by_rows: Whether large leaves are worked on a few rows at a time.
    """
    plain = part in ("embedding", "head") and not config.quantize_embeddings
    codecs = {} if plain else fallback_codecs(config)
    b1, b2 = rule.fallback_betas
    if config.fallback == "lion":
        direction = optax.scale_by_lion(b1, b2)
    else:
        direction = optax.scale_by_adam(b1, b2, nesterov=rule.fallback_nesterov)
    tx = optax.chain(
        direction,
        decay_weights(rule.fallback_decay, cautious=config.cautious_decay),
        optax.scale_by_learning_rate(rule.fallback_rate),
    )
    tx = _quantized(in_float32(tx), codecs, config)
    tx = landing(tx, config, short, rule.average)
    if not by_rows or not (codecs or short):
        return tx
    return sequence(tx, max_bytes=_ROW_BYTES, core_ndim=1)
