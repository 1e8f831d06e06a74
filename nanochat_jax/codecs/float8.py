"""Codes that are short floats."""

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from nanochat_jax.codecs.base import Blockwise

LARGEST = 448.0
"""The largest finite `float8_e4m3fn`."""


class Float8(Blockwise):
    """8-bit floats (e4m3fn: 4 bits of exponent, 3 of mantissa), scaled by block.

    An entry is within a sixteenth of its own size down to 3.5e-5 of the block's
    largest, and below that within 2.2e-6 of it.

    Example:
      >>> stored = Float8().encode(jnp.asarray([2.0, -1.0, 0.01]))
      >>> stored.codes
      Array([448, -224, 2.25], dtype=float8_e4m3fn)

    Attributes:
      block_size: Entries of the last axis that share one scale.
      scale_dtype: Type of the scales.
    """

    @property
    def _range(self) -> tuple[float, float]:
        return -LARGEST, LARGEST

    def _round(self, quotients: Array, key: PRNGKeyArray | None) -> Array:
        del key
        return jnp.clip(quotients, -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)

    def _levels_of(self, codes: Array) -> Array:
        return codes.astype(jnp.float32)
