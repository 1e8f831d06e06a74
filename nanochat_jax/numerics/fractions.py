"""Polar factors by fractions of the Gram matrix, whose poles are Zolotarev's.

Axis letters: `m` rows, `n` columns.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanochat_jax.numerics.inverse import identity, inverse, inverse_flops
from nanochat_jax.numerics.polar import normalize, sum_over
from nanochat_jax.numerics.symmetric import Products, mirror, products_here
from nanochat_jax.polynomials import ZOLOTAREV, Fractions


def zolotarev(
    x: Float[Array, "*batch m n"],
    fractions: Fractions = ZOLOTAREV[2],
    *,
    axis_name: tuple[str, ...] = (),
    products: Products | None = None,
) -> Float[Array, "*batch m n"]:
    """Returns an approximate polar factor of `x` from inverses of its Gram matrix.

    It is `(constant I + Σ weight (G + shift I)⁻¹) X`, of the Gram matrix `G` of the
    short side: two inverses bring singular values nearer to one than five steps of
    Newton-Schulz, in half of the operations and on square matrices of thousands of rows
    in a third. It needs float32, so that processors gain by it, and not where products
    of bfloat16 are many times as fast.
    `x` is divided by the fourth root of the sum of the fourth powers of its singular
    values, which is no less than the largest. A zero matrix gives zero.

    Example:
      >>> o = zolotarev(jax.random.normal(jax.random.key(0), (4, 64, 256)))
      >>> bool(jnp.allclose(jnp.linalg.svdvals(o), 1, atol=0.13))
      True

    Args:
      x: Matrices to orthogonalise.
      fractions: Poles and their weights.
      axis_name: As for `newton_schulz`.
      products: How to multiply; as is best on JAX's default backend if not given.

    Returns:
      An array of the shape and type of `x`, with singular values near one.
    """
    products = products_here() if products is None else products
    return _zolotarev(x, fractions, axis_name, products)


def zolotarev_flops(
    shape: tuple[int, ...],
    fractions: Fractions = ZOLOTAREV[2],
    *,
    products: Products | None = None,
) -> int:
    """Returns the floating-point operations of the products in `zolotarev`.

    Args:
      shape: Shape of the matrices, `[*batch, m, n]`.
      fractions: As for `zolotarev`.
      products: As for `zolotarev`.
    """
    products = products_here() if products is None else products
    short, long = sorted(shape[-2:])
    inverses = len(fractions.terms) * inverse_flops(short)
    applied = 2 * short**2 * long
    return math.prod(shape[:-2]) * (products.flops(short, long) + inverses + applied)


# Traced once for each shape, not once for each of many leaves.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _zolotarev(
    x: Array, fractions: Fractions, axis_name: tuple[str, ...], products: Products
) -> Array:
    wide = bool(axis_name) or x.shape[-2] <= x.shape[-1]
    y = normalize(x, axis_name=axis_name)
    y = y if wide else y.mT
    gram = mirror(sum_over(axis_name, products.gram(y)))
    norm = jnp.linalg.norm(gram, axis=(-2, -1), keepdims=True)
    norm = jnp.where(norm > 0, norm, 1.0)
    gram, eye = gram / norm, identity(gram.shape[-1], gram)

    # A loop: an inverse to compile, and one at a time in memory.
    def add(total: Array, term: Array) -> tuple[Array, None]:
        weight, shift = term
        return total + weight * inverse(gram + shift * eye), None

    start = jnp.broadcast_to(fractions.constant * eye, gram.shape)
    terms = jnp.asarray(fractions.terms, jnp.float32)
    factor = jax.lax.scan(add, start, terms)[0] / jnp.sqrt(norm)
    y = products.multiply("...ij,...jk->...ik", factor, y)
    return (y if wide else y.mT).astype(x.dtype)
