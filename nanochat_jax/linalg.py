"""Matrix routines on bare arrays: orthogonalisation and low-rank bases.

Everything here acts on the last two axes and treats the axes before them as a batch, so
a stack of layers `[layers, m, n]` needs no `vmap`.

Axis letters: `m` rows, `n` columns, `r` rank.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, PRNGKeyArray

Coefficients = tuple[float, float, float]

QUINTIC: tuple[Coefficients, ...] = ((3.4445, -4.7750, 2.0315),) * 5
"""Keller Jordan's quintic (Muon, 2024): fast at small singular values, and loose at the
top. Five steps take singular values in [0.01, 1] into [0.68, 1.14]."""


def newton_schulz(
    x: Float[Array, "*batch m n"],
    coefficients: Sequence[Coefficients] = QUINTIC,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*batch m n"]:
    """Returns an approximate polar factor of `x` by Newton-Schulz iteration.

    Each step applies the odd polynomial `aX + b(XXᵀ)X + c(XXᵀ)²X`, which moves every
    singular value towards one and leaves the singular vectors alone. Hence
    `newton_schulz(p @ x) == p @ newton_schulz(x)` for any `p` with orthonormal columns.
    The scale of `x` is divided out in float32 before the cast to `dtype`: gradients of
    1e-30 and of 1e30 give the same result, and a zero matrix gives zero.

    Example:
      >>> o = newton_schulz(jax.random.normal(jax.random.key(0), (4, 64, 256)))
      >>> o.shape  # singular values of each of the four matrices are near one
      (4, 64, 256)

    Args:
      x: Matrices to orthogonalise.
      coefficients: One `(a, b, c)` for each step.
      dtype: Type of the iterate. Products accumulate in float32 whatever it is.

    Returns:
      An array of the shape and type of `x`, with singular values near one.
    """
    wide = x.shape[-2] <= x.shape[-1]
    # The Gram matrix is always taken on the short side. Naming the contracted axes
    # keeps explicit transposes out of the compiled program.
    gram_axes = "...ik,...jk->...ij" if wide else "...ki,...kj->...ij"
    apply_axes = "...ij,...jk->...ik" if wide else "...jk,...ki->...ji"
    y = normalize(x).astype(dtype)
    for a, b, c in coefficients:
        gram = _product(gram_axes, y, y)
        square = _product("...ij,...jk->...ik", gram.astype(dtype), gram.astype(dtype))
        polynomial = (b * gram + c * square).astype(dtype)
        factors = (polynomial, y) if wide else (y, polynomial)
        y = (a * y.astype(jnp.float32) + _product(apply_axes, *factors)).astype(dtype)
    return y.astype(x.dtype)


def range_basis(
    x: Float[Array, "*batch m n"],
    rank: int,
    key: PRNGKeyArray,
    *,
    oversample: int = 8,
    power_steps: int = 2,
) -> Float32[Array, "*batch m {rank}"]:
    """Returns an orthonormal basis of the leading column space of `x`.

    A randomised singular value decomposition: Halko, Martinsson and Tropp (2011),
    algorithms 4.4 (subspace iteration) and 5.1. QR orthonormalises between products;
    the basis is orthonormal for any finite `x`, a zero matrix included.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (64, 256))
      >>> p = range_basis(x, 8, jax.random.key(1))
      >>> p.shape, bool(jnp.allclose(p.mT @ p, jnp.eye(8), atol=1e-5))
      ((64, 8), True)

    Args:
      x: Matrices to approximate.
      rank: Columns of the basis, at most `m`.
      key: Key of the random sketch.
      oversample: Columns of the sketch beyond `rank`.
      power_steps: Subspace iterations. One is the least that is accurate on flat
        spectra, two are comfortable.

    Returns:
      The basis, leading directions first.
    """
    x = normalize(x)
    width = min(rank + oversample, x.shape[-2])
    sketch = jax.random.normal(key, (*x.shape[:-2], x.shape[-1], width), jnp.float32)
    q = jnp.linalg.qr(_product("...mn,...nk->...mk", x, sketch)).Q
    for _ in range(power_steps):
        back = _product("...mn,...mk->...nk", x, q)
        q = jnp.linalg.qr(_product("...mn,...nk->...mk", x, back)).Q
    # The small factor `qᵀx` is short and long: the eigenvectors of its Gram matrix are
    # its left singular vectors, at a fraction of the cost of its decomposition.
    small = _product("...mk,...mn->...kn", q, x)
    vectors = jnp.linalg.eigh(_product("...in,...jn->...ij", small, small))[1]
    return _product("...mk,...kr->...mr", q, vectors[..., ::-1][..., :rank])


def normalize(x: Float[Array, "*batch m n"]) -> Float32[Array, "*batch m n"]:
    """Returns `x` in float32 with Frobenius norm one; a zero matrix stays zero.

    The largest entry is divided out first, so that no square over- or underflows.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    return x / jnp.where(norm > 0, norm, 1.0)


def _product(axes: str, x: Array, y: Array) -> Array:
    # Highest: on accelerators float32 would otherwise be rounded to shorter mantissas.
    return jnp.einsum(
        axes, x, y, precision="highest", preferred_element_type=jnp.float32
    )
