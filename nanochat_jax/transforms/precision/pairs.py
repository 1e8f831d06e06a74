"""A float32 number as bfloat16 and low bits.

A bfloat16 is the upper half of a float32. So all of this is arithmetic on bits, taken
as integers: adding to the bits of a number adds to its magnitude, whatever its sign.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float32, Int, Int32

HALF = 1 << 15
"""Half the distance of two bfloat16, in bits of float32."""

UPPER = -1 << 16
"""Mask of the bits of float32 that bfloat16 has."""


def join(
    short: BFloat16[Array, "*shape"], low: Int[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    """Returns the float32 number of a bfloat16 and its low bits.

    Args:
      short: The number, rounded.
      low: What rounding took, in units of 2⁻⁸ (int8) or 2⁻¹⁶ (int16) of the last place
        of `short`, positive away from zero.
    """
    shift = 16 - 8 * low.dtype.itemsize
    return _float(_bits(short) + (low.astype(jnp.int32) << shift))


def split(
    x: Float32[Array, "*shape"], low_bits: int
) -> tuple[BFloat16[Array, "*shape"], Int[Array, "*shape"]]:
    """Returns the bfloat16 nearest to a number, and its low bits.

    Args:
      x: The number.
      low_bits: Number of low bits, 8 or 16.
    """
    short, bits = nearest(x, low_bits)
    stored = short.astype(jnp.bfloat16)
    return stored, low(bits, stored, low_bits)


def nearest(
    x: Float32[Array, "*shape"], low_bits: int
) -> tuple[Float32[Array, "*shape"], Int32[Array, "*shape"]]:
    """Returns the bfloat16 nearest to a number, and the bits of the number to keep.

    Args:
      x: The number.
      low_bits: Number of its low bits, 8 or 16.

    Returns:
      The bfloat16, in float32, and the bits of `x`, rounded to the upper
      `16 + low_bits`.
    """
    bits, shift = _bits(x), 16 - low_bits
    if shift:
        # To even, or else many roundings would move the mean.
        odd = (bits >> shift) & 1
        bits = (bits + (1 << (shift - 1)) - 1 + odd) & (-1 << shift)
    return _float((bits + HALF) & UPPER), bits


def low(
    bits: Int32[Array, "*shape"], stored: BFloat16[Array, "*shape"], low_bits: int
) -> Int[Array, "*shape"]:
    """Returns the low bits of a number for the bfloat16 that is stored for it.

    Args:
      bits: Bits of the number, from `nearest`.
      stored: A bfloat16 near to it. If the two are too far apart for the low bits,
        these come as close as they can.
      low_bits: Number of low bits, 8 or 16.

    Returns:
      Integers of that many bits; zero where `stored` is not finite.
    """
    short = _bits(stored)
    most = 1 << (low_bits - 1)
    steps = jnp.clip((bits - short) >> (16 - low_bits), -most, most - 1)
    has_sign = (bits ^ short) >= 0
    steps = jnp.where(has_sign & jnp.isfinite(stored), steps, 0)
    return steps.astype(f"int{low_bits}")


def dithered(
    x: Float32[Array, "*shape"], uniform: Float32[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    """Returns one of the two bfloat16 around a finite number, in float32.

    Args:
      x: The number.
      uniform: Random numbers in `[0, 1)`. If one is at least the distance of `x` from
        the outer bfloat16, as a part of the distance of the two, that one is taken.
    """
    noise = (uniform * 2.0**16).astype(jnp.int32)
    return _float((_bits(x) + noise) & UPPER)


def total(
    weight: Float32[Array, "*shape"], update: Float32[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    """Returns the sum of a weight and an update, the same in every kernel."""
    # A compiler merges the product that made an update with this sum, which is then
    # rounded once and not twice. It may do so in the kernel of the weight and not in
    # that of its low bits, which then miss each other. It does not see through the
    # clip, which changes no number.
    most = float(jnp.finfo(jnp.float32).max)
    finite = jnp.clip(update, -most, most)
    return weight + jnp.where(jnp.isfinite(update), finite, update)


def widen(short: BFloat16[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Returns a bfloat16 in float32."""
    # Compilers may drop a cast to bfloat16 before a cast to float32, but no bits.
    return _float(_bits(short))


def _bits(x: Array) -> Int32[Array, "..."]:
    """Returns the bits of float32, or of bfloat16 as float32."""
    if x.dtype == jnp.float32:
        return lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32) << 16


def _float(bits: Int32[Array, "..."]) -> Float32[Array, "..."]:
    return lax.bitcast_convert_type(bits, jnp.float32)
