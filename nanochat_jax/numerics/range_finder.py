"""Low-rank bases of bare matrices by randomised subspace iteration.

Everything here acts on the last two axes and treats the axes before them as a batch.

Axis letters: `m` rows, `n` columns, `r` rank.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32

from nanochat_jax.numerics.hashing import symmetric
from nanochat_jax.numerics.symmetric import product

POWER_ITERATIONS = 3
"""Products with `XXᵀ` from a random sketch to a basis."""

_NOISE = 2.0**-20
"""Weight of the sketch added to each normalised product, to keep it of full rank."""


# Traced once for each shape, not once for each of many leaves.
@functools.partial(
    jax.jit, static_argnames=("rank", "power_iterations", "aligned", "form_gram")
)
def range_basis(
    x: Float[Array, "*batch m n"],
    rank: int,
    seed: ArrayLike,
    *,
    power_iterations: int = POWER_ITERATIONS,
    aligned: bool = True,
    form_gram: bool | None = None,
    start: ArrayLike = 0,
) -> Float32[Array, "*batch m {rank}"]:
    """Returns an orthonormal basis near the leading column space of `x`.

    Subspace iteration from a random sketch (Halko, Martinsson and Tropp 2011, algorithm
    4.4): `power_iterations` products with `XXᵀ`, which is formed once where this takes
    fewer operations. If the basis need not be `aligned`, all of it is matrix products
    and Cholesky factors. It is orthonormal for any finite `x`, a zero matrix included.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (64, 256))
      >>> p = range_basis(x, 8, seed=1)
      >>> p.shape, bool(jnp.allclose(p.mT @ p, jnp.eye(8), atol=1e-5))
      ((64, 8), True)

    Args:
      x: Matrices to approximate.
      rank: Columns of the basis, at most `m`.
      seed: Unsigned 32-bit seed of the random sketch.
      power_iterations: Products with `XXᵀ`, at least one. On flat spectra two capture
        0.90 of the energy of the exact decomposition, and three 0.94.
      aligned: Whether the columns are near singular directions, leading first, rather
        than any basis of their span. This takes the eigenvectors of an `r x r` matrix.
      form_gram: Whether to form `XXᵀ` first; if not given, where that takes fewer
        operations. If the columns of `x` are sharded, devices then add up one `m x m`
        matrix, else an `m x r` matrix for each product.
      start: Position of the first number of the sketch: matrix `i` of a stack has the
        numbers from `i * rank * m` on.

    Returns:
      The basis.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    x = _unit(x / jnp.where(largest > 0, largest, 1.0))  # no square over- or underflows
    if form_gram is None:
        short, long = x.shape[-2:]
        form_gram = _gram_is_cheaper(short, long, rank, power_iterations)
    multiply = _products_with_gram(x, form_gram)
    # Not signs: a small matrix of signs can be singular, and rounding then decides the
    # basis.
    sketch = symmetric(seed, (*x.shape[:-2], rank, x.shape[-2]), start)
    sketch = jax.lax.optimization_barrier(sketch / math.sqrt(x.shape[-2]))
    # Where `x` has less than full rank, the sketch fills up the basis.
    mend = lambda y: _unit(y) + _NOISE * sketch
    y = sketch
    for _ in range(power_iterations - 1):
        y = _precondition(mend(multiply(y)))
    if not aligned:
        return _orthonormalize(mend(multiply(y))).mT
    # The eigenvectors need rows that are orthonormal to 1e-5 only.
    y = _nearly_orthonormalize(_precondition(_unit(y)))
    z = multiply(y)
    vectors = jnp.linalg.eigh(product("...rm,...km->...rk", y, z))[1][..., ::-1]
    # `y` is orthonormal, so `y(XXᵀ + c)` has full rank; a sketch of all of the space
    # may be nearly singular.
    z = _unit(z) + _NOISE * y
    return _orthonormalize(product("...kr,...km->...rm", vectors, z)).mT


def range_basis_flops(
    shape: tuple[int, ...], rank: int, *, power_iterations: int = POWER_ITERATIONS
) -> int:
    """Returns the floating-point operations of `range_basis`.

    Args:
      shape: Shape of the matrices, `[*batch, m, n]`.
      rank: As for `range_basis`.
      power_iterations: As for `range_basis`.
    """
    short, long = shape[-2:]
    if _gram_is_cheaper(short, long, rank, power_iterations):
        total = 2 * short**2 * (long + power_iterations * rank)
    else:
        total = 4 * power_iterations * short * long * rank
    # If `aligned`: preconditioning, orthonormalising, rotating, orthonormalising again.
    passes = power_iterations - 1 + 5 + 2 * _shifted_passes(rank, short)
    total += passes * (3 * short * rank**2 + rank**3 // 3) + 4 * short * rank**2
    return math.prod(shape[:-2]) * total


def _products_with_gram(x: Array, form_gram: bool) -> Callable[[Array], Array]:
    """Returns the function `q -> qXXᵀ`."""
    if form_gram:
        gram = product("...mn,...kn->...mk", x, x)
        return lambda q: product("...rk,...km->...rm", q, gram)
    return lambda q: product(
        "...rn,...mn->...rm", product("...rm,...mn->...rn", q, x), x
    )


def _gram_is_cheaper(short: int, long: int, rank: int, power_iterations: int) -> bool:
    """Returns whether products with `XXᵀ` cost less with it formed first."""
    products = 2 * power_iterations * rank
    return short * (long + products / 2) < products * long


def _orthonormalize(y: Array) -> Array:
    """Returns orthonormal rows with the span of the rows of `y`, of norm one.

    Shifted Cholesky QR (Fukaya et al. 2020). In float32 Cholesky's method fails on
    matrices of condition over 3e3; a shifted pass takes at most the root of it, so that
    `y` may have one of 1e6, and of 1e9 if it is nearly square.
    """
    return _cholesky_qr(_nearly_orthonormalize(_precondition(y)))


def _precondition(y: Array) -> Array:
    """Returns rows of length up to one with the span of the rows of `y`."""
    return _cholesky_qr(y, 1e-6)


def _nearly_orthonormalize(y: Array) -> Array:
    """Returns rows with the span of the rows of `y`, orthonormal to 1e-5."""
    for _ in range(_shifted_passes(*y.shape[-2:])):
        # Shift relative to the actual norm, which a few rows may carry.
        squares = _power_of_two(jnp.sum(y * y, axis=(-2, -1), keepdims=True))
        y = _cholesky_qr(y, 2e-7 * squares)
    return _cholesky_qr(y)


def _shifted_passes(rank: int, short: int) -> int:
    """Returns how many passes bring rows near enough to orthonormal ones.

    A random sketch of most of a space is far worse conditioned than one of a part.
    """
    return 2 if 2 * rank > short else 1


def _cholesky_qr(y: Array, shift: Array | float | None = None) -> Array:
    """Returns `L⁻¹y`, where `LLᵀ` is the Gram matrix of the rows of `y`, shifted."""
    gram = product("...rm,...km->...rk", y, y)
    if shift is not None:
        gram += shift * jnp.broadcast_to(
            jnp.eye(*gram.shape[-2:], dtype=gram.dtype), gram.shape
        )
    factor = jnp.linalg.cholesky(gram, symmetrize_input=False)
    solve: Any = jax.lax.linalg.triangular_solve
    return solve(factor, y.mT, lower=True, transpose_a=True).mT


def _unit(y: Array) -> Array:
    """Returns matrices of Frobenius norm from one to two; zero stays zero."""
    norm = _power_of_two(jnp.linalg.norm(y, axis=(-2, -1), keepdims=True))
    return y / jnp.where(norm > 0, norm, 1.0)


def _power_of_two(x: Array) -> Array:
    """Returns the largest powers of two up to positive numbers; zero stays zero.

    Numbers that are added up in another order, as in a stack of another size, differ
    in the last bit. Their powers of two do not, and to divide by one is exact, so that
    bases are the same to the bit.
    """
    exponent = jax.lax.bitcast_convert_type(x, jnp.uint32) & 0x7F800000
    return jax.lax.bitcast_convert_type(exponent, jnp.float32)
