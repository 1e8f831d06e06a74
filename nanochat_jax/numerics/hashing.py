"""Random numbers that cost no more than the arithmetic beside them.

Rounding and sketches do not need the quality of `jax.random`, whose code takes as long
to compile for each array as all other work on it, and makes copies. Hashes of positions
are random enough.
"""

import math
import zlib

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
    bits = _hashes(*jax.random.key_data(key), shape=shape)
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def symmetric(
    seed: ArrayLike, shape: tuple[int, ...], start: ArrayLike = 0
) -> Float32[Array, "*shape"]:
    """Returns numbers evenly spread over `[-√3, √3)`: of mean 0 and variance 1.

    Args:
      seed: Unsigned 32-bit integer.
      shape: Shape of the result.
      start: Position of the first number, see `start_of`.
    """
    first = mix_bits(jnp.asarray(seed, jnp.uint32)) + jnp.asarray(start, jnp.uint32)
    bits = _hashes(first, shape=shape)
    return ((bits >> 8).astype(jnp.float32) * 2.0**-23 - 1.0) * math.sqrt(3.0)


def mix_bits(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Returns a hash of each integer: the last mixing step of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def start_of(layer: ArrayLike, shape: tuple[int, ...]) -> UInt32[Array, ""]:
    """Returns the position of the first entry of a part of an array, modulo 2³².

    Numbers that start there are those that the part has in the whole.

    Example:
      >>> whole = symmetric(0, (4, 2, 3))
      >>> part = symmetric(0, (1, 2, 3), start_of(2, (1, 2, 3)))
      >>> bool((part == whole[2:3]).all())
      True

    Args:
      layer: Index on the first axis of the whole of the first entry of the part.
      shape: Shape of the part.
    """
    stride = jnp.uint32(math.prod(shape[1:]) % 2**32)
    return jnp.asarray(layer).astype(jnp.uint32) * stride


def _hashes(
    first: UInt32[Array, ""], *words: UInt32[Array, ""], shape: tuple[int, ...]
) -> UInt32[Array, "*shape"]:
    """Returns hashes of the position of each entry, counted from `first` on.

    Args:
      first: A position, of any size: what stands before it is another array's.
      *words: Integers that are hashed with every position.
      shape: Shape of the result.
    """
    # Counted axis by axis, so that the count can be sharded, and from `first` on: XLA
    # would move a count that does not depend on the step out of a loop, and store it.
    count = jnp.broadcast_to(first, shape)
    for axis, size in enumerate(shape):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        along = jax.lax.iota(jnp.uint32, size) * jnp.uint32(stride)
        count += jax.lax.broadcast_in_dim(along, shape, (axis,))
    bits = mix_bits(count)
    for word in words:
        bits = mix_bits(bits ^ mix_bits(word))
    return bits


def leaf_key(seed: int, count: Array, name: str, start: ArrayLike = 0) -> PRNGKeyArray:
    """Returns the random key of one leaf at one step, for `uniform`.

    Keys follow from seed, step and name, so that no state holds one.

    Args:
      seed: Seed of the run.
      count: Number of the step.
      name: Path of the leaf.
      start: Position in the leaf of the first number to draw, see `start_of`.
    """
    return composed_key(count, jnp.uint32(leaf_word(seed, name)), start)


def leaf_word(seed: int, name: str) -> int:
    """Returns the part of a key that depends on seed and leaf.

    Args:
      seed: Seed of the run.
      name: Path of the leaf.
    """
    return zlib.crc32(f"{seed} {name}".encode())


def composed_key(
    count: Array, word: UInt32[Array, ""], start: ArrayLike = 0
) -> PRNGKeyArray:
    """Returns the random key of the leaf of a `leaf_word`, as `leaf_key` has it.

    Args:
      count: Number of the step.
      word: The word.
      start: Position in the leaf of the first number to draw, see `start_of`.
    """
    # Composed, not derived, which would compile code for each leaf. The step is first,
    # so that hashes depend on it and are not moved out of a loop.
    first = mix_bits(count.astype(jnp.uint32)) + jnp.asarray(start, jnp.uint32)
    data = jnp.stack([first, word])
    return jax.random.wrap_key_data(data, impl="threefry2x32")
