"""Levels with evenly spaced logarithms, as telephony has them."""

import functools

import numpy as np

from nanochat_jax.codecs.tables import Levels, TableCodec

MU = 255.0
"""Ratio of the widest gap between levels to the narrowest, less one."""


class MuLaw8(TableCodec):
    """Levels of the μ-law, `((1 + μ)^|k/127| - 1) / μ`, with a scale for each block.

    For blocks of mixed scale: the gap between levels is 4.5 % of the level, and never
    under 0.02 % of the scale. It has a larger error than `Int8` where the entries of a
    block are alike, and a smaller one for entries below a tenth of the largest.

    Example:
      >>> stored = MuLaw8().encode(jnp.asarray([1.0, -0.1, 0.01, 0.0]))
      >>> MuLaw8().decode(stored, 4).round(3)
      Array([ 1.  , -0.1 ,  0.01,  0.  ], dtype=float32)

    Attributes:
      block_size: Entries of the last axis that share one scale.
      scale_dtype: Type of the scales.
    """

    @property
    def levels(self) -> Levels:
        """Levels by code, in units of the block's scale."""
        return _mu_law()


@functools.cache
def _mu_law() -> Levels:
    k = np.arange(-127, 128) / 127
    levels = np.sign(k) * np.expm1(np.abs(k) * np.log1p(MU)) / MU
    return tuple(float(level) for level in levels.astype(np.float32))
