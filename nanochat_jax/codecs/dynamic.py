"""The dynamic map: a decimal float whose digits are fewer the smaller it is."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from nanochat_jax.codecs import blocks
from nanochat_jax.codecs.base import Quantized
from nanochat_jax.codecs.tables import Levels, TableCodec, nearest

DECADES = 7


@dataclasses.dataclass(frozen=True)
class Dynamic8(TableCodec):
    """The dynamic 8-bit map (Dettmers 2016), with a scale for each block.

    Each of the seven decades below the scale has twice as many levels as the one below
    it, from one to 64 on each side of zero, or from two to 128 without a sign. An entry
    is within 0.7 % of the scale at the top, and is not lost down to 3e-7 of it. The
    table is that of bitsandbytes to the bit. A code is its position there, but where
    the largest entry of a block is negative the scale is 0.7 % larger, since the lowest
    level is -0.993: without this, such entries would fade each time they are stored.

    Example:
      >>> stored = Dynamic8().encode(jnp.asarray([1.0, 0.1, -1e-6, 0.0]))
      >>> stored.codes  # 127 is zero
      Array([255, 190, 126, 127], dtype=uint8)

    Attributes:
      block_size: Entries of the last axis that share one scale.
      signed: Whether there are levels below zero. Without, negative entries are stored
        as zero and their levels refine the positive ones.
      zero: Whether entries are rounded to zero. Second moments, which are divided by,
        need `signed=False, zero=False`: entries that would round to zero are stored as
        the smallest level, 3e-7 of the scale. A block of zeros stays zero.
      scale_dtype: Type of the scales.
    """

    signed: bool = True
    zero: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.signed and not self.zero:
            raise ValueError(
                "`zero=False` is for second moments, which have no sign: it needs "
                "`signed=False`, got `signed=True`."
            )

    @property
    def levels(self) -> Levels:
        """Levels by code, in units of the block's scale."""
        return dynamic_map(self.signed)

    def encode(
        self, x: Float[Array, "*rows n"], key: PRNGKeyArray | None = None
    ) -> Quantized:
        """Returns `x` in stored form; `key` is not used."""
        stored = super().encode(x, key)
        if self.zero:
            return stored
        # A zero block has the code of zero, whatever scale it is given later.
        empty = blocks.spread(stored.scales == 0, self.block_size, x.shape[-1])
        codes = jnp.where(empty, jnp.uint8(0), stored.codes)
        return dataclasses.replace(stored, codes=codes)

    def _round(self, quotients: Array, key: PRNGKeyArray | None) -> Array:
        del key
        codes = nearest(quotients, self.levels)
        return codes if self.zero else jnp.maximum(codes, 1)


@functools.cache
def dynamic_map(signed: bool) -> Levels:
    """Returns the 256 levels of the dynamic map in rising order."""
    sides = (1, -1) if signed else (1,)
    levels = [np.float32(0), np.float32(1)]
    for i in range(DECADES):
        decade = np.float32(10.0 ** (i - DECADES + 1))
        centers = decade * _centers(2**i if signed else 2 ** (i + 1))
        levels += [side * center for side in sides for center in centers]
    return tuple(float(level) for level in sorted(levels))


def _centers(count: int) -> np.ndarray:
    """Returns the centers of `count` equal parts of [0.1, 1], in float32.

    Edges are counted from the nearer end and rounded once, as in bitsandbytes, so that
    the two maps are equal to the bit.
    """
    start, end = np.float32(0.1), np.float32(1)
    step = np.float64((end - start) / np.float32(count))
    i = np.arange(count + 1)
    rising, falling = start + step * i, end - step * (count - i)
    edges = np.where(i < (count + 1) // 2, rising, falling).astype(np.float32)
    return (edges[1:] + edges[:-1]) / np.float32(2)
