"""Codecs with evenly spaced levels."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from nanochat_jax.codecs import blocks
from nanochat_jax.codecs.base import Blockwise
from nanochat_jax.numerics import hashing


@dataclasses.dataclass(frozen=True)
class _Linear(Blockwise):
    """Symmetric evenly spaced levels, the integers in `±levels`."""

    stochastic_rounding: bool = False
    levels: ClassVar[int]

    @property
    def needs_key(self) -> bool:
        """Whether `encode` needs a key."""
        return self.stochastic_rounding

    @property
    def _range(self) -> tuple[float, float]:
        return float(-self.levels), float(self.levels)

    def _round(self, quotients: Array, key: PRNGKeyArray | None) -> Array:
        if not self.stochastic_rounding:
            codes = jnp.round(quotients)
        elif key is None:
            raise ValueError("Stochastic rounding needs a `key`, got None.")
        else:
            codes = jnp.floor(quotients + hashing.uniform(key, quotients.shape))
        return jnp.clip(codes, -self.levels, self.levels).astype(jnp.int8)

    def _levels_of(self, codes: Array) -> Array:
        return codes.astype(jnp.float32)


class Int8(_Linear):
    """Evenly spaced 8-bit codes with an absolute-maximum scale for each block.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (16, 200))
      >>> stored = Int8().encode(x)
      >>> stored.codes.shape, stored.scales.shape  # 200 = 128 + 72
      ((16, 200), (16, 2))

    Attributes:
      block_size: Entries of the last axis that share one scale.
      stochastic_rounding: Whether to round up with the probability of the remainder,
        which is unbiased and has √2 times the error of rounding to nearest.
      scale_dtype: Type of the scales.
    """

    levels = 127


class Int4(_Linear):
    """Evenly spaced 4-bit codes, two to a byte, with a scale for each block.

    Neighbours on the last axis share a byte, the even one in its low half. An odd last
    axis leaves the last half byte zero.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (16, 200))
      >>> stored = Int4().encode(x)
      >>> stored.codes.shape, stored.codes.dtype.name
      ((16, 100), 'uint8')

    Attributes:
      block_size: Entries of the last axis that share one scale.
      stochastic_rounding: As for `Int8`.
      scale_dtype: Type of the scales.
    """

    levels = 7

    def _pack(self, codes: Array) -> Array:
        return blocks.pack(codes)

    def _unpack(self, codes: Array, size: int) -> Array:
        # Shifting right arithmetically restores the sign.
        high = blocks.unpack(codes, size) << 4
        return jax.lax.bitcast_convert_type(high, jnp.int8) >> 4
