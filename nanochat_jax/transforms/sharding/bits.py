"""The bits of short floats as integers, for operations that only move them."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped


def to_bits(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Returns the bits of short floats, other arrays as they are.

    Compilers for processors without bfloat16 widen it to float32 wherever it goes: to
    write a few entries into an array they widen all of it, and to send it to another
    device they send twice the bytes.
    """
    size = x.dtype.itemsize
    if size >= 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * size}"))


def from_bits(x: Shaped[Array, "*shape"], dtype: DTypeLike) -> Shaped[Array, "*shape"]:
    """Undoes `to_bits`."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)
