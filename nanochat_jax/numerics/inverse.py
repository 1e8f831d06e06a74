"""Inverses of positive definite matrices, in products of matrices only.

An inverse is `ZᵀZ`, where `Z` is the inverse of the Cholesky factor. Eliminating in
`A` without a factor takes fewer operations, but its rounding errors grow by the square
of the condition number, not by its root. LAPACK has no part in it: beside other work
on few processor cores its calls have been seen to wait for ever.

Axis letters: `s` rows and columns.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanochat_jax.numerics.symmetric import product

HALVED_FROM = (256, 1024)
"""Sizes from which a matrix is factored by halves, and these by halves of theirs.

Each time its code is there twice, and most of what can be saved is saved after two.
"""

SMALL = 8
"""Rows of the blocks that are eliminated row by row."""

_times = functools.partial(product, "...ij,...jk->...ik")
_times_transposed = functools.partial(product, "...ik,...jk->...ij")
_transposed_times = functools.partial(product, "...ki,...kj->...ij")


def inverse(a: Float[Array, "*batch s s"]) -> Float[Array, "*batch s s"]:
    """Returns the inverse of positive definite matrices, in float32.

    In operations it is one and a half products of such matrices for `s` of 768, one and
    a quarter for thousands, and nearly three for less than 256.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (20, 50))
      >>> bool(jnp.allclose(inverse(x @ x.mT) @ (x @ x.mT), jnp.eye(20), atol=1e-3))
      True

    Args:
      a: Positive definite matrices.
    """
    half = a.shape[-1] // 2
    z = _factor(a, _halvings(a.shape[-1]))
    across = _transposed_times(z[..., half:, :half], z[..., half:, half:])
    top = _transposed_times(z[..., :half], z[..., :half])
    corner = _transposed_times(z[..., half:, half:], z[..., half:, half:])
    return _joined(top, across, across.mT, corner)


def inverse_flops(size: int) -> int:
    """Returns the operations of the products in `inverse`.

    Args:
      size: Rows and columns of the matrix, `s`.
    """
    half, rest = size // 2, size - size // 2
    applied = 2 * (half**2 * size + half * rest**2 + rest**3)
    return applied + _factor_flops(size, _halvings(size))


def identity(size: int, like: Array) -> Array:
    """Returns an identity matrix, of the type and as many axes as `like`."""
    eye = jnp.eye(size, dtype=like.dtype)
    return eye.reshape((1,) * (like.ndim - 2) + eye.shape)


def _factor(a: Array, halvings: int) -> Array:
    """Returns the inverse of the lower Cholesky factor."""
    size = a.shape[-1]
    if not halvings:
        return _eliminated(a, _blocks(size))
    half = size // 2
    top = _factor(a[..., :half, :half], halvings - 1)
    below = _times_transposed(a[..., half:, :half], top)
    rest = a[..., half:, half:] - _times_transposed(below, below)
    corner = _factor(rest, halvings - 1)
    below = -_times(corner, _times(below, top))
    return _joined(top, jnp.zeros_like(below).mT, below, corner)


def _halvings(size: int) -> int:
    return sum(size >= least for least in HALVED_FROM)


def _joined(top: Array, across: Array, below: Array, corner: Array) -> Array:
    rows = [top, across], [below, corner]
    return jnp.concatenate([jnp.concatenate(r, axis=-1) for r in rows], axis=-2)


def _blocks(size: int) -> list[int]:
    """Returns the rows of the blocks eliminated at a time, and of those in them."""
    if size <= SMALL:
        return [1]
    eighth = SMALL * -(-size // SMALL**2)
    return [SMALL, 1] if eighth == SMALL else [eighth, SMALL, 1]


def _eliminated(a: Array, blocks: list[int]) -> Array:
    """Returns the inverse Cholesky factor, by blocks of the first of these sizes.

    Each step factors a block on the diagonal and eliminates what is below it, in `A`
    and in an identity beside it, which becomes the inverse of the factor.
    """
    size, block = a.shape[-1], blocks[0]
    padded = -(-size // block) * block
    eye = identity(padded, a)
    row = jax.lax.broadcasted_iota(jnp.int32, (*eye.shape[:-1], 1), a.ndim - 2)
    if padded > size:  # by the identity, which is its own factor
        widths = [(0, 0)] * (a.ndim - 2) + [(0, padded - size)] * 2
        a = jnp.pad(a, widths) + jnp.where(row < size, 0, eye)

    def eliminate(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        a, z = carry
        slice_of = lambda x, axis: jax.lax.dynamic_slice_in_dim(
            x, k * block, block, axis
        )
        columns = slice_of(a, -1)
        pivot = slice_of(columns, -2)
        if block == 1:
            pivot = jax.lax.rsqrt(pivot)
            times = times_transposed = jnp.multiply
        else:
            pivot = _eliminated(pivot, blocks[1:])
            times, times_transposed = _times, _times_transposed
        rows = times(pivot, slice_of(z, -2))
        below = jnp.where(row < (k + 1) * block, 0, times_transposed(columns, pivot))
        z = jax.lax.dynamic_update_slice_in_dim(
            z - times(below, rows), rows, k * block, -2
        )
        if block == 1:
            return a - below * below.mT, z
        return a - _times_transposed(below, below), z

    start = a, jnp.broadcast_to(eye, a.shape)
    z = jax.lax.fori_loop(0, padded // block, eliminate, start)[1]
    return z[..., :size, :size]


def _factor_flops(size: int, halvings: int) -> int:
    if not halvings:
        return _eliminate_flops(size, _blocks(size))
    half, rest = size // 2, size - size // 2
    products = 2 * (2 * half**2 * rest + 2 * half * rest**2)
    return products + sum(_factor_flops(x, halvings - 1) for x in (half, rest))


def _eliminate_flops(size: int, blocks: list[int]) -> int:
    block = blocks[0]
    if block == 1:
        return 0
    count = -(-size // block)
    padded = count * block
    inside = _eliminate_flops(block, blocks[1:])
    return count * (4 * padded * block**2 + 4 * padded**2 * block + inside)
