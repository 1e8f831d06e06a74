"""Codecs of the optimizer's state, as a configuration asks."""

import functools
from collections.abc import Callable
from typing import Any

from nanochat_jax.codecs import BFloat16, Codec, Dynamic8, Int4, Int8, Normal2, Normal4
from nanochat_jax.config import OptimizerConfig
from nanochat_jax.transforms import projection, saves_bytes

_BASIS_CODECS = {8: Int8, 4: Int4}
_COMPLEMENT_CODECS = {4: Normal4, 2: Normal2}
_SCALES = "bfloat16"
_SCALE_BITS = 16


def state_codecs(config: OptimizerConfig) -> dict[str, Codec]:
    """Returns the codecs of the state of the matrices, by field.

    Args:
      config: Settings of the optimizer.
    """
    codecs: dict[str, Codec] = {}
    if config.use_8bit_optim:
        few = Int4 if config.stochastic_rounding else Normal4
        codec = Int8 if config.quant_bits == 8 else few
        codecs["momentum"] = _first_moment(config, codec)
    codecs |= _precondition_codecs(config)
    if config.use_galore and config.stored_projector_bits in _BASIS_CODECS:
        codec = _BASIS_CODECS[config.stored_projector_bits]
        codecs["basis"] = codec(config.quant_block_size, scale_dtype=_SCALES)
    if config.use_galore and config.galore_rest_bits in _COMPLEMENT_CODECS:
        codec = _COMPLEMENT_CODECS[config.galore_rest_bits]
        codecs["complement"] = _blocks(config, codec)
    return codecs


def average_codecs(config: OptimizerConfig) -> dict[str, Codec]:
    """Returns the codec of the average of weights, by field.

    Args:
      config: Settings of the optimizer.
    """
    if not config.use_8bit_optim:
        return {}
    # To nearest, what a late small update adds to the difference would be lost.
    return {"average": _blocks(config, Int8, stochastic_rounding=True)}


def _precondition_codecs(config: OptimizerConfig) -> dict[str, Codec]:
    if config.precondition is None:
        return {}
    codecs: dict[str, Codec] = {}
    if config.use_8bit_optim:
        codecs["second_moment"] = _blocks(config, Dynamic8, signed=False, zero=False)
    if config.stored_precondition_bits < 32:
        few = config.stored_precondition_bits == 8
        sides = ("short", "long") if config.precondition == "both" else ("short",)
        for field in (f"{name}_{side}" for name in ("gram", "basis") for side in sides):
            # Nearly diagonal, and of many magnitudes, are the averages.
            codec = Dynamic8 if field.startswith("gram") else Int8
            codecs[field] = _blocks(config, codec) if few else BFloat16()
    return codecs


def fallback_codecs(config: OptimizerConfig) -> dict[str, Codec]:
    """Returns the codecs of the state of AdamW or Lion, by field.

    Args:
      config: Settings of the optimizer.
    """
    if not config.use_8bit_optim:
        return {}
    first = _first_moment(config, Int8)
    if config.fallback == "lion":
        return {"mu": first}
    second = Dynamic8(
        config.quant_block_size,
        signed=False,
        zero=False,
        scale_dtype=_SCALES,
    )
    return {"mu": first, "nu": second}


def projects(config: OptimizerConfig) -> Callable[[tuple[int, ...], int], bool]:
    """Returns the function that decides which matrices `galore` projects.

    Args:
      config: Settings of the optimizer.
    """
    return functools.partial(saves_bytes, basis_cost=basis_cost(config))


def rank_of(config: OptimizerConfig, shape: tuple[int, ...]) -> int | None:
    """Returns the rank to which a matrix is projected, `None` for full rank.

    Args:
      config: Settings of the optimizer.
      shape: Shape of the matrix.
    """
    if not config.use_galore:
        return None
    return projection.projected_rank(shape, config.rank, projects(config))


def basis_cost(config: OptimizerConfig) -> float:
    """Returns the bytes of a stored entry of the basis over those of the momentum.

    Args:
      config: Settings of the optimizer.
    """
    codecs = state_codecs(config)

    def stored_bits(field: str, bits: int) -> float:
        codec: Any = codecs.get(field)
        return bits + _SCALE_BITS / codec.block_size if codec else bits

    momentum_bits = config.quant_bits if config.use_8bit_optim else 32
    return stored_bits("basis", config.stored_projector_bits) / stored_bits(
        "momentum", momentum_bits
    )


def _first_moment(config: OptimizerConfig, codec: Any) -> Codec:
    """Returns the codec of a first moment, which may round stochastically."""
    rounding = {"stochastic_rounding": True} if config.stochastic_rounding else {}
    return _blocks(config, codec, **rounding)


def _blocks(config: OptimizerConfig, codec: Any, **kwargs: Any) -> Codec:
    """Returns a codec with the block size of the configuration."""
    # Few bits are accurate only with half as many entries to a scale.
    block = config.quant_block_size
    block = max(1, block // 2) if codec in (Normal2, Normal4) else block
    return codec(block, scale_dtype=_SCALES, **kwargs)
