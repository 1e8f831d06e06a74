"""Low-rank bases of bare matrices by randomised subspace iteration.

Everything here acts on the last two axes and treats the axes before them as a batch.

Axis letters: `m` rows, `n` columns, `r` rank.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, UInt32

from nanochat_jax.linalg import normalize, product

OVERSAMPLE, POWER_STEPS = 8, 2
"""Columns of a random sketch beyond the rank, and its subspace iterations."""


def range_basis(
    x: Float[Array, "*batch m n"],
    rank: int,
    seed: ArrayLike,
    *,
    start: Float[Array, "*batch m r"] | None = None,
    oversample: int = OVERSAMPLE,
    power_steps: int = POWER_STEPS,
) -> Float32[Array, "*batch m {rank}"]:
    """Returns an orthonormal basis of the leading column space of `x`.

    A randomised singular value decomposition: subspace iteration from a random sketch
    (Halko, Martinsson and Tropp 2011, algorithm 4.4), then the leading eigenvectors of
    `XXᵀ` within the subspace. All products are with `XXᵀ`, which is formed once where
    this takes fewer operations. QR orthonormalises between products; the basis is
    orthonormal for any finite `x`, a zero matrix included.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (64, 256))
      >>> p = range_basis(x, 8, seed=1)
      >>> p.shape, bool(jnp.allclose(p.mT @ p, jnp.eye(8), atol=1e-5))
      ((64, 8), True)

    Args:
      x: Matrices to approximate.
      rank: Columns of the basis, at most `m`.
      seed: Unsigned 32-bit integer that the sketch hangs on.
      start: Orthonormal columns to begin with, such as the basis of a matrix nearby;
        the sketch is only for the columns that are missing.
      oversample: Columns of the sketch beyond `rank`.
      power_steps: Products with `XXᵀ` before the last. One is the least that is
        accurate on flat spectra, two are comfortable; zero will do from a good `start`.

    Returns:
      The basis, leading directions first.
    """
    x = normalize(x)
    short, long = x.shape[-2:]
    width = min(rank + oversample, short)
    gram = None
    if _gram_is_cheaper(short, long, width, power_steps):
        gram = product("...mn,...kn->...mk", x, x)

    def multiply(q: Array) -> Array:
        if gram is not None:
            return product("...mk,...kr->...mr", gram, q)
        return product("...mn,...nr->...mr", x, product("...mn,...mr->...nr", x, q))

    q = _sketch(seed, (*x.shape[:-1], width), start)
    for _ in range(power_steps):
        q = jnp.linalg.qr(multiply(q)).Q
    if power_steps == 0:
        q = jnp.linalg.qr(q).Q
    small = product("...mk,...mr->...kr", q, multiply(q))
    vectors = jnp.linalg.eigh(small)[1]
    return product("...mk,...kr->...mr", q, vectors[..., ::-1][..., :rank])


def range_basis_flops(
    shape: tuple[int, ...],
    rank: int,
    *,
    oversample: int = OVERSAMPLE,
    power_steps: int = POWER_STEPS,
) -> int:
    """Returns the floating-point operations of the products in `range_basis`.

    Args:
      shape: Shape of the matrices, `[*batch, m, n]`.
      rank: As for `range_basis`.
      oversample: As for `range_basis`.
      power_steps: As for `range_basis`.
    """
    short, long = shape[-2:]
    width = min(rank + oversample, short)
    if _gram_is_cheaper(short, long, width, power_steps):
        total = 2 * short**2 * (long + (power_steps + 1) * width)
    else:
        total = 4 * (power_steps + 1) * short * long * width
    small = 2 * short * width * (width + min(rank, width))
    return math.prod(shape[:-2]) * (total + small)


def _gram_is_cheaper(short: int, long: int, width: int, power_steps: int) -> bool:
    """Returns whether products with `XXᵀ` cost less with it formed first."""
    products = 2 * (power_steps + 1) * width
    return short * (long + products / 2) < products * long


def _sketch(seed: ArrayLike, shape: tuple[int, ...], start: Array | None) -> Array:
    """Returns the columns of `start` and, up to `shape`, random signs."""
    # Not `jax.random`: a sketch needs no generator of that quality, whose code for each
    # leaf took a third of the time to compile GaLore. A mixed counter is random enough.
    count = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    bits = mix_bits(count ^ mix_bits(jnp.asarray(seed, jnp.uint32)))
    signs = jnp.where(bits >> 31, 1.0, -1.0)
    if start is None:
        return signs
    start = start.astype(jnp.float32)[..., : shape[-1]]
    missing = shape[-1] - start.shape[-1]
    return jnp.concatenate([start, signs[..., :missing]], axis=-1)


def mix_bits(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Returns a hash of each integer: the last mixing step of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
