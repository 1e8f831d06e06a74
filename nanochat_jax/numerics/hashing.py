"""Random numbers that cost no more than the arithmetic beside them.

Rounding and sketches do not need the quality of `jax.random`, whose code takes as long
to compile for each array as all other work on it, and makes copies. Hashes of positions
are random enough.
"""

import math
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float32, PRNGKeyArray, UInt32


def uniform(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float32[Array, "*shape"]:
    """Returns numbers evenly spread over `[0, 1)`, in steps of 2⁻²⁴.

    Example:
      >>> x = uniform(jax.random.key(0), (100, 100))
      >>> bool(abs(x.mean() - 0.5) < 0.01)
      True

    Args:
      key: PRNG key; all of its bits are used.
      shape: Shape of the result.
    """
    bits = _hashes(list(jax.random.key_data(key)), shape)
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def symmetric(seed: ArrayLike, shape: tuple[int, ...]) -> Float32[Array, "*shape"]:
    """Returns numbers evenly spread over `[-√3, √3)`: of mean 0 and variance 1.

    Args:
      seed: Unsigned 32-bit integer.
      shape: Shape of the result.
    """
    bits = _hashes([seed], shape)
    return ((bits >> 8).astype(jnp.float32) * 2.0**-23 - 1.0) * math.sqrt(3.0)


def mix_bits(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Returns a hash of each integer: the last mixing step of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _hashes(
    words: Sequence[ArrayLike], shape: tuple[int, ...]
) -> UInt32[Array, "*shape"]:
    """Returns hashes of the position of each entry with all of the words."""
    first, *others = (mix_bits(jnp.asarray(word, jnp.uint32)) for word in words)
    # Counted axis by axis, so that the count can be sharded, and from `first` on: XLA
    # would move a count that does not depend on the step out of a loop, and store it.
    count = jnp.broadcast_to(first, shape)
    for axis, size in enumerate(shape):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        along = jax.lax.iota(jnp.uint32, size) * jnp.uint32(stride)
        count += jax.lax.broadcast_in_dim(along, shape, (axis,))
    bits = mix_bits(count)
    for word in others:
        bits = mix_bits(bits ^ word)
    return bits


def leaf_key(seed: int, count: Array, name: str) -> PRNGKeyArray:
    """Returns the random key of one leaf at one step.

    Keys follow from seed, step and name, so that no state holds one.

    Args:
      seed: Seed of the run.
      count: Number of the step.
      name: Path of the leaf.
    """
    # Composed, not derived, which would compile code for each leaf. The step is first,
    # so that hashes depend on it and are not moved out of a loop.
    words = [count, jnp.uint32(zlib.crc32(f"{seed} {name}".encode()))]
    data = jnp.stack([word.astype(jnp.uint32) for word in words])
    return jax.random.wrap_key_data(data, impl="threefry2x32")
