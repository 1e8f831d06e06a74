"""In what codecs a configuration stores the state."""

from typing import Any

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
from nanochat_jax.config import OptimizerConfig

_CODECS: dict[str, Any] = {
    "int8": Int8,
    "dynamic8": Dynamic8,
    "mulaw8": MuLaw8,
    "float8": Float8,
}
_PROJECTOR_CODECS = {8: Int8, 4: Int4}
_REST_CODECS = {8: Int8, 4: Normal4, 2: Normal2}


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
