"""Products of bare matrices, and what symmetric ones save.

Of a product that is known to be symmetric the upper half and the lower right quarter
are enough: three quarters of the operations. The rest is copied over.

Axis letters: `s` rows and columns of a symmetric matrix, `h` rows of its upper half.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HALVES_FROM = 512
"""Size from which two products of parts take less time than one of the whole.

Measured on a processor: at 768 it saves 8 to 12 % of a Newton-Schulz iteration, at 256
it costs as much. Other devices were not measured, and get the whole.
"""


class Halves(NamedTuple):
    """What determines a symmetric matrix.

    Attributes:
      top: Its upper half, or all of it.
      corner: Its lower right quarter, or nothing.
    """

    top: Float[Array, "*batch h s"]
    corner: Float[Array, "*batch s-h s-h"]


def product(axes: str, x: Array, y: Array) -> Float[Array, "..."]:
    """Returns the product over `axes`, as in `jnp.einsum`, added up in float32.

    That is the type of the result, except of bfloat16 on accelerators, which is rounded
    to bfloat16: there, writing and reading float32 takes as long as the product itself.
    """
    short = x.dtype == jnp.bfloat16 and jax.default_backend() != "cpu"
    result = jnp.bfloat16 if short else jnp.float32
    # Highest: on accelerators float32 would otherwise be rounded to shorter mantissas.
    return jnp.einsum(axes, x, y, precision="highest", preferred_element_type=result)


def gram(x: Float[Array, "*batch s n"]) -> Halves:
    """Returns `XXᵀ`.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (64, 256))
      >>> bool(jnp.allclose(mirror(gram(x)), x @ x.mT, rtol=1e-4))
      True
    """
    rows = upper_rows(x.shape[-2])
    # Naming the contracted axes keeps explicit transposes out of the compiled program.
    multiply = lambda x, y: product("...ik,...jk->...ij", x, y)
    below = x[..., rows:, :]
    return Halves(multiply(x[..., :rows, :], x), multiply(below, below))


def commuting_product(
    x: Float[Array, "*batch s s"], y: Float[Array, "*batch s s"]
) -> Halves:
    """Returns `XY` of symmetric matrices that commute.

    Such are polynomials of one symmetric matrix, and so is their product.
    """
    rows = upper_rows(x.shape[-2])
    multiply = lambda x, y: product("...ij,...jk->...ik", x, y)
    return Halves(
        multiply(x[..., :rows, :], y), multiply(x[..., rows:, :], y[..., rows:])
    )


def mirror(halves: Halves) -> Float[Array, "*batch s s"]:
    """Returns the whole of a symmetric matrix."""
    top, corner = halves
    if not corner.size:
        return top
    below = jnp.concatenate([top[..., top.shape[-2] :].mT, corner], axis=-1)
    return jnp.concatenate([top, below], axis=-2)


def halve(x: Float[Array, "*batch s s"]) -> Halves:
    """Undoes `mirror`."""
    rows = upper_rows(x.shape[-1])
    return Halves(x[..., :rows, :], x[..., rows:, rows:])


def upper_rows(size: int) -> int:
    """Returns how many rows the upper half of a matrix of that size has here."""
    if size < HALVES_FROM or jax.default_backend() != "cpu":
        return size
    return size // 2


def halves_flops(size: int, inner: int) -> int:
    """Returns the operations of a symmetric product, `[s, n]` by `[n, s]`.

    Args:
      size: Rows of the product, `s`.
      inner: Columns of the first factor, `n`.
    """
    rows = upper_rows(size)
    return 2 * inner * (rows * size + (size - rows) ** 2)
