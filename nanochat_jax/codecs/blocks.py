"""Blocks of the last axis, and several codes to a byte."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt8


def split(
    x: Shaped[Array, "*rows n"], block_size: int
) -> Shaped[Array, "*rows blocks size"]:
    """Returns `x` in blocks of its last axis, padded with zeros at the end.

    An axis shorter than a block is one block, without padding.
    """
    size = min(block_size, x.shape[-1])
    widths = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    return jnp.pad(x, widths).reshape(*x.shape[:-1], -1, size)


def join(
    x: Shaped[Array, "*rows blocks size"], size: int
) -> Shaped[Array, "*rows {size}"]:
    """Undoes `split` of an array with a last axis of `size`."""
    return x.reshape(*x.shape[:-2], -1)[..., :size]


def spread(
    x: Shaped[Array, "*rows blocks"], block_size: int, size: int
) -> Shaped[Array, "*rows {size}"]:
    """Repeats the value of each block for all entries of a last axis of `size`."""
    entries = min(block_size, size)
    return join(jnp.broadcast_to(x[..., None], (*x.shape, entries)), size)


def pack(codes: Shaped[Array, "*rows n"], bits: int = 4) -> UInt8[Array, "*rows bytes"]:
    """Packs the low `bits` of bytes, the first code lowest in its byte.

    Unused bits of the last byte are zero.
    """
    per_byte = 8 // bits
    low = jax.lax.bitcast_convert_type(codes, jnp.uint8) & (2**bits - 1)
    widths = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_byte)]
    parts = split(jnp.pad(low, widths), per_byte)
    shifted = (parts[..., i] << (bits * i) for i in range(per_byte))
    return functools.reduce(jnp.bitwise_or, shifted)


def unpack(
    packed: UInt8[Array, "*rows bytes"], size: int, bits: int = 4
) -> UInt8[Array, "*rows {size}"]:
    """Undoes `pack` of an array with a last axis of `size`."""
    shifts = range(0, 8, bits)
    parts = [packed >> shift & (2**bits - 1) for shift in shifts]
    return join(jnp.stack(parts, axis=-1), size)
