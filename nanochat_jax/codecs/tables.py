"""Codecs whose levels are any sorted table: rounded by a search, decoded by a look-up.

The search takes a fixed handful of operations whatever the table: the leading bits of a
float, its sign, exponent and some of its mantissa, say between which two levels it can
lie, and one comparison with the midpoint of those two settles it.
"""

import abc
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, PRNGKeyArray, UInt8

from nanochat_jax.codecs.base import Blockwise

Levels = tuple[float, ...]
"""Levels in rising order, at most 256, with the largest at 1."""


class TableCodec(Blockwise):
    """A codec whose code is the position of a level in a table."""

    @property
    @abc.abstractmethod
    def levels(self) -> Levels:
        """Levels by code, in units of the block's scale."""

    @property
    def _range(self) -> tuple[float, float]:
        # Without negative levels, negative entries still count for the scale.
        return self.levels[0] or -1.0, self.levels[-1]

    def _round(self, quotients: Array, key: PRNGKeyArray | None) -> Array:
        del key
        return nearest(quotients, self.levels)

    def _levels_of(self, codes: Array) -> Array:
        return jnp.asarray(self.levels, jnp.float32)[codes]


def nearest(x: Float32[Array, "*shape"], levels: Levels) -> UInt8[Array, "*shape"]:
    """Returns for each entry the position of the level nearest to it."""
    bins = _bins(levels)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    leading = jnp.clip((bits & 0x7FFFFFFF) >> bins.shift, bins.low, bins.high)
    # A flat position: compilers turn two indices into code ten times slower.
    side = (bits >> 31) * (bins.high - bins.low + 1)
    below = jnp.asarray(bins.below)[side + leading - bins.low]
    above = x >= jnp.asarray(bins.midpoints)[below]
    return below + above.astype(below.dtype)


class _Bins(NamedTuple):
    """Ranges of floats that share their leading bits.

    Attributes:
      shift: Trailing bits that are left out.
      low: The leading bits of the bin nearest to zero, which takes in all below it.
      high: The leading bits of 1, whose bin takes in all above it.
      below: By bin, those of positive floats before those of negative ones, the lowest
        level that may be nearest to a float of the bin. The only other is the next.
      midpoints: `[levels]`, the midpoint of each level and the next; at last infinity.
    """

    shift: int
    low: int
    high: int
    below: np.ndarray
    midpoints: np.ndarray


@functools.cache
def _bins(levels: Levels) -> _Bins:
    """Returns the widest bins that hold one midpoint at most."""
    values = np.asarray(levels)
    midpoints = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    bits = np.abs(midpoints).view(np.uint32)
    # Midpoints are in one bin if they differ only in the bits that are left out.
    same_side = np.sign(midpoints[1:]) == np.sign(midpoints[:-1])
    differing = (bits[1:] ^ bits[:-1])[same_side]
    shift = int(differing.min(initial=1 << 23)).bit_length() - 1  # at most a mantissa
    low, high = int(bits.min()) >> shift, int(np.float32(1).view(np.uint32)) >> shift
    leading = np.arange(low, high + 1, dtype=np.uint32) << shift
    nearer = leading.view(np.float32)
    farther = (leading | ((1 << shift) - 1)).view(np.float32)
    nearer[0] = 0
    below = np.searchsorted(midpoints, np.concatenate([nearer, -farther]), "right")
    return _Bins(
        shift,
        low,
        high,
        below.astype(np.uint8),
        np.append(midpoints, np.float32("inf")),
    )
