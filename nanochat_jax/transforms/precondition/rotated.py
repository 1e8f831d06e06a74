"""Division by running root mean squares, in the coordinates of eigenbases."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Float32

from nanochat_jax.transforms.galore import projection


def divide(
    x: Float[Array, "*batch m n"],
    bases: tuple[Array | None, Array | None],
    second_moment: Float32[Array, "*batch m n"],
    ready: Bool[Array, "*batch"],
    beta: ArrayLike,
) -> tuple[Float32[Array, "*batch m n"], Float32[Array, "*batch m n"]]:
    """Divides matrices by the root of their mean squares in other coordinates.

    The norm of each matrix is kept.

    Args:
      x: The matrices.
      bases: Orthonormal bases of their rows and of their columns, `None` for none.
      second_moment: Moving average of the squares of rotated matrices so far.
      ready: Whether the bases of a matrix have been computed. If not, it passes.
      beta: Decay of the average.

    Returns:
      The matrices, and the average with their squares.
    """
    x = x.astype(jnp.float32)
    rotated = rotate(x, bases)
    average = beta * second_moment + (1 - beta) * jnp.square(rotated)
    finite = jnp.isfinite(jnp.sum(average, axis=(-2, -1)))
    # An average that was not finite once would never be so again.
    average = jnp.where(_over(ready & finite), average, second_moment)
    average = average.astype(jnp.float32)
    # At most 1 / √(1 - beta), since the average has these squares in it.
    divided = rotated * jnp.where(average > 0, jax.lax.rsqrt(average), 0)
    back = rotate(divided, bases, back=True)
    # Of the rotated matrices, whose norm is that of `x` but for rounding.
    size, now = _norm(x), _norm(divided)
    back *= size / jnp.where(now > 0, now, 1)
    # Where every square underflows, nothing is left to divide by.
    return jnp.where(_over(ready) & (now > 0), back, x), average


def rotate(
    x: Float32[Array, "*batch m n"],
    bases: tuple[Array | None, Array | None],
    *,
    back: bool = False,
) -> Float32[Array, "*batch m n"]:
    """Returns `PᵀXQ` for bases `P` of the rows and `Q` of the columns, or `PXQᵀ`.

    Args:
      x: Matrices in the coordinates of the gradient, or `back` in those of the bases.
      bases: The bases, `None` for the identity.
      back: Whether to undo the rotation.
    """
    rows, columns = bases
    if rows is not None:
        x = projection.matmul(rows if back else rows.mT, x)
    if columns is not None:
        x = projection.matmul(x, columns.mT if back else columns)
    return x


def _norm(x: Array) -> Float32[Array, "*batch 1 1"]:
    return jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))


def _over(mask: Array) -> Array:
    """Returns a mask of matrices as one of their entries."""
    return mask[..., None, None]
