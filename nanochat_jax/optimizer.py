"""Muon for matrices, AdamW or Lion for the rest, as a configuration asks.

`build_optimizer` only assembles transforms. For `use_8bit_optim` and `use_galore` both:

    partition(
        matrix: quantize_state(chain(galore(momentum, residual), orthogonalize))
                -> scale_by_shape -> weight decay -> learning rate,
        embedding, head, vector: quantize_state(AdamW))
"""

from typing import Any

import optax

from nanochat_jax.codecs import (
    Codec,
    Dynamic8,
    Float8,
    Int4,
    Int8,
    MuLaw8,
    Normal2,
    Normal4,
)
from nanochat_jax.coefficients import POLYNOMIALS
from nanochat_jax.config import OptimizerConfig
from nanochat_jax.labels import label_params
from nanochat_jax.linalg import resolve_dtype
from nanochat_jax.sharding import distribute, shardings_of
from nanochat_jax.transforms import (
    Adaptive,
    galore,
    momentum,
    orthogonalize,
    quantize_state,
    scale_by_shape,
    sequence,
)

_CODECS: dict[str, Any] = {
    "int8": Int8,
    "dynamic8": Dynamic8,
    "mulaw8": MuLaw8,
    "float8": Float8,
}
_PROJECTOR_CODECS = {8: Int8, 4: Int4}
_REST_CODECS = {8: Int8, 4: Normal4, 2: Normal2}

# Rows of a quantised embedding that are decoded at a time, in float32: 2 MiB.
_ROW_BYTES = 1 << 21


def build_optimizer(
    config: OptimizerConfig,
    params: optax.Params,
    labels: optax.Params | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer that `config` asks for.

    Example:
      >>> params = {"block": {"kernel": jnp.zeros((256, 512)), "bias": jnp.zeros(512)}}
      >>> config = OptimizerConfig(use_8bit_optim=True, use_galore=True, galore_rank=64)
      >>> tx = build_optimizer(config, params)
      >>> state = tx.init(params)

    Args:
      config: What to build.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s. If they are sharded over
        several devices, the optimizer is made to `distribute` its work over these.
      labels: A tree like `params` of `"matrix"`, `"embedding"`, `"head"` and
        `"vector"`; by `label_params` if not given.

    Returns:
      An Optax transformation, from gradients to updates.
    """
    labels = label_params(params) if labels is None else labels
    by_label = optax.partition(
        {
            "matrix": matrix_optimizer(config),
            "embedding": _table_optimizer(config),
            "head": _table_optimizer(config),
            "vector": _quantized(
                _fallback(config, 0.0), fallback_codecs(config), config
            ),
        },
        # A tree that is an Equinox module can be called, and `partition` would do so.
        lambda _: labels,
    )
    tx = by_label
    if config.grad_clip:
        clip = optax.clip_by_global_norm(config.grad_clip)
        tx = optax.named_chain(("clip", clip), ("by_label", by_label))
    shardings = shardings_of(params)
    return tx if shardings is None else distribute(tx, shardings)


def matrix_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Builds the Muon variant that `config` asks for, for trees of matrices only."""
    return sequence(
        optax.named_chain(
            ("direction", _direction(config)),
            ("shape", scale_by_shape(config.muon_scale)),
            ("decay", optax.add_decayed_weights(config.weight_decay)),
            ("rate", optax.scale_by_learning_rate(schedule(config, config.lr))),
        ),
        # Adaptive GaLore decides for all matrices of a leaf together.
        core_ndim=None if config.use_galore and config.galore_adaptive else 2,
    )


def state_codecs(config: OptimizerConfig) -> dict[str, Codec]:
    """Returns the codecs of the state of the matrices, by field."""
    codecs: dict[str, Codec] = {}
    if config.use_8bit_optim:
        by_bits = {
            8: _CODECS[config.quant_codec],
            4: Int4 if config.stochastic_rounding else Normal4,
            2: Normal2,
        }
        codecs["momentum"] = _first_moment(config, by_bits[config.quant_bits])
    if config.use_galore and config.stored_projector_bits in _PROJECTOR_CODECS:
        codec = _PROJECTOR_CODECS[config.stored_projector_bits]
        codecs["projector"] = codec(
            config.quant_block_size, scale_dtype=config.quant_scale_dtype
        )
    if config.use_galore and config.galore_rest_bits in _REST_CODECS:
        codec = _REST_CODECS[config.galore_rest_bits]
        codecs["rest"] = _blocks(config, codec)
    return codecs


def fallback_codecs(config: OptimizerConfig) -> dict[str, Codec]:
    """Returns the codecs of the state of AdamW or Lion, by field."""
    if not config.use_8bit_optim:
        return {}
    first = _first_moment(config, _CODECS[config.quant_codec])
    if config.fallback == "lion":
        return {"mu": first}
    second = Dynamic8(
        config.quant_block_size,
        signed=False,
        zero=False,
        scale_dtype=config.quant_scale_dtype,
    )
    return {"mu": first, "nu": second}


def schedule(config: OptimizerConfig, peak: float) -> optax.Schedule:
    """Builds the learning rate by step: linear warm-up, plateau if any, decay.

    Step `s` of `w` of warm-up has `(s + 1) / w` of the peak. The decay would reach
    `min_lr_frac` of it at `total_steps`, one step after the last.

    Args:
      config: Which course it takes.
      peak: Highest rate.
    """
    warmup, start, floor = config.warmup_steps, config.decay_start, config.min_lr_frac
    length = max(config.total_steps - start, 1)
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, length, alpha=floor)
    else:
        fall = optax.linear_schedule(peak, floor * peak, length)
    stages = [rise, optax.constant_schedule(peak), fall]
    return optax.join_schedules(stages, [warmup, start])


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """Nests momentum, orthogonalisation, low-rank space and storage."""
    average = momentum(config.muon_momentum)
    polynomials = POLYNOMIALS[config.ns_method].take(config.ns_steps)
    step = orthogonalize(polynomials, dtype=resolve_dtype(config.ns_dtype))
    if not config.use_galore:
        tx = optax.chain(average, step)
    elif config.galore_residual:
        tx = optax.chain(_galore(average, config), step)
    else:
        tx = _galore(optax.chain(average, step), config)
    return _quantized(tx, state_codecs(config), config)


def _quantized(
    tx: optax.GradientTransformation,
    codecs: dict[str, Codec],
    config: OptimizerConfig,
) -> optax.GradientTransformation:
    if not codecs:
        return tx
    return quantize_state(tx, codecs, min_size=config.quant_min_size, seed=config.seed)


def _first_moment(config: OptimizerConfig, codec: Any) -> Codec:
    """Returns a codec of that kind, as the configuration has it."""
    rounding = {"stochastic_rounding": True} if config.stochastic_rounding else {}
    return _blocks(config, codec, **rounding)


def _blocks(config: OptimizerConfig, codec: Any, **kwargs: Any) -> Codec:
    """Returns a codec of that kind with the blocks and scales of the configuration."""
    # Half as many entries to a scale are what makes few bits accurate.
    block = config.quant_block_size
    block = max(1, block // 2) if codec in (Normal2, Normal4) else block
    return codec(block, scale_dtype=config.quant_scale_dtype, **kwargs)


def projector_cost(config: OptimizerConfig) -> float:
    """Returns the bytes of a stored entry of the basis over those of the momentum."""
    scale_bits = 32 if config.quant_scale_dtype == "float32" else 16
    codecs = state_codecs(config)

    def stored_bits(field: str, bits: int) -> float:
        codec: Any = codecs.get(field)
        return bits + scale_bits / codec.block_size if codec else bits

    momentum_bits = config.quant_bits if config.use_8bit_optim else 32
    return stored_bits("projector", config.stored_projector_bits) / stored_bits(
        "momentum", momentum_bits
    )


def _galore(
    inner: optax.GradientTransformation, config: OptimizerConfig
) -> optax.GradientTransformation:
    return galore(
        inner,
        config.rank,
        refresh_every=config.galore_update_freq,
        refresh_stagger=config.galore_stagger,
        adaptive=Adaptive() if config.galore_adaptive else None,
        warm_start=config.galore_warm_start,
        momentum_share=config.galore_momentum_share,
        # Turning a basis changes float32 momentum of matrices in nothing but time.
        aligned=config.use_8bit_optim,
        residual=config.galore_residual,
        rest=momentum(config.galore_rest_momentum) if config.galore_rest_bits else None,
        match_norm=config.galore_match_norm,
        scale=config.galore_scale,
        projector_dtype="bfloat16" if config.stored_projector_bits == 16 else "float32",
        projector_cost=projector_cost(config),
        seed=config.seed,
    )


def _table_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Builds the optimizer of embeddings and head."""
    tx = _fallback(config, config.weight_decay)
    codecs = fallback_codecs(config)
    if not codecs or not config.quantize_embeddings:
        return tx
    tx = _quantized(tx, codecs, config)
    return sequence(tx, max_bytes=_ROW_BYTES, core_ndim=1)


def _fallback(
    config: OptimizerConfig, weight_decay: float
) -> optax.GradientTransformation:
    rate = schedule(config, config.fallback_peak_lr)
    if config.fallback == "lion":
        return optax.lion(rate, *config.lion_betas, weight_decay=weight_decay)
    return optax.adamw(rate, *config.adam_betas, weight_decay=weight_decay)
