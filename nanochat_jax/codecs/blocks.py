"""Blocks of the last axis, and two codes to a byte."""

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


def pack(codes: Shaped[Array, "*rows n"]) -> UInt8[Array, "*rows half"]:
    """Returns the low halves of bytes, two to a byte, the even one in its low half.

    An odd last axis leaves the last half byte zero.
    """
    halves = jax.lax.bitcast_convert_type(codes, jnp.uint8) & 0xF
    if codes.shape[-1] == 1:
        return halves
    pairs = split(halves, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(
    packed: UInt8[Array, "*rows half"], size: int
) -> UInt8[Array, "*rows {size}"]:
    """Undoes `pack` of an array with a last axis of `size`."""
    return join(jnp.stack([packed & 0xF, packed >> 4], axis=-1), size)
