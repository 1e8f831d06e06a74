"""Products of bare matrices, in fewer operations where the result is symmetric.

The upper half and the lower right quarter of a symmetric product determine it: three
quarters of the operations. The other quarter is copied.

Axis letters: `s` rows and columns of a symmetric matrix, `h` rows of its upper half.
"""

import dataclasses
import math
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nanochat_jax.numerics.forms import wide_ratio

HALVES_FROM = 512
"""Size from which two products of parts take less time than the full product.

Measured on a processor: at 768 it saves 8 to 12 % of a Newton-Schulz iteration, at 256
it costs as much. Other devices were not measured, and compute the full product.
"""


class Halves(NamedTuple):
    """The parts that determine a symmetric matrix.

    Attributes:
      top: Its upper half, or all of it.
      corner: Its lower right quarter, or nothing.
    """

    top: Float[Array, "*batch h s"]
    corner: Float[Array, "*batch s-h s-h"]


@dataclasses.dataclass(frozen=True)
class Products:
    """How a machine multiplies matrices: a static argument of compiled functions.

    Attributes:
      halves_from: Size from which a symmetric product is computed in two parts.
      short_results: Whether products of bfloat16 are rounded to bfloat16. Products are
        added up in float32 either way, but on accelerators writing and reading float32
        takes as long as the product itself.
      wide_ratio: Long side over short side above which Newton-Schulz in float32, in the
        Gram form, takes less time than in bfloat16.
    """

    halves_from: int = sys.maxsize
    short_results: bool = False
    wide_ratio: float = math.inf

    def multiply(self, axes: str, x: Array, y: Array) -> Float[Array, "..."]:
        """Returns the product over `axes`, in float32 unless results are short."""
        short = self.short_results and x.dtype == jnp.bfloat16
        return product(axes, x, y, jnp.bfloat16 if short else jnp.float32)

    def gram(self, x: Float[Array, "*batch s n"]) -> Halves:
        """Returns `XXᵀ`.

        Example:
          >>> x = jax.random.normal(jax.random.key(0), (64, 256))
          >>> bool(jnp.allclose(mirror(Products(8).gram(x)), x @ x.mT, rtol=1e-4))
          True
        """
        rows = self.upper_rows(x.shape[-2])
        # Naming the contracted axes keeps explicit transposes out of the program.
        multiply = lambda x, y: self.multiply("...ik,...jk->...ij", x, y)
        below = x[..., rows:, :]
        return Halves(multiply(x[..., :rows, :], x), multiply(below, below))

    def commuting(
        self, x: Float[Array, "*batch s s"], y: Float[Array, "*batch s s"]
    ) -> Halves:
        """Returns `XY` of symmetric matrices that commute, which is symmetric too."""
        rows = self.upper_rows(x.shape[-2])
        multiply = lambda x, y: self.multiply("...ij,...jk->...ik", x, y)
        below = multiply(x[..., rows:, :], y[..., rows:])
        return Halves(multiply(x[..., :rows, :], y), below)

    def halve(self, x: Float[Array, "*batch s s"]) -> Halves:
        """Undoes `mirror`."""
        rows = self.upper_rows(x.shape[-1])
        return Halves(x[..., :rows, :], x[..., rows:, rows:])

    def flops(self, size: int, inner: int) -> int:
        """Returns the operations of a symmetric product, `[s, n]` by `[n, s]`.

        Args:
          size: Rows of the product, `s`.
          inner: Columns of the first factor, `n`.
        """
        rows = self.upper_rows(size)
        return 2 * inner * (rows * size + (size - rows) ** 2)

    def upper_rows(self, size: int) -> int:
        """Returns the rows of the upper half of a matrix; all if it is not halved."""
        return size if size < self.halves_from else size // 2


def products_here() -> Products:
    """Returns how JAX's default backend multiplies matrices."""
    if jax.default_backend() != "cpu":
        return Products(short_results=True)
    return Products(HALVES_FROM, wide_ratio=wide_ratio())


def product(
    axes: str, x: Array, y: Array, dtype: DTypeLike = jnp.float32
) -> Float[Array, "..."]:
    """Returns the product over `axes`, as `jnp.einsum`, of the result type `dtype`."""
    # Highest: on accelerators float32 would otherwise be rounded to shorter mantissas.
    return jnp.einsum(axes, x, y, precision="highest", preferred_element_type=dtype)


def mirror(halves: Halves) -> Float[Array, "*batch s s"]:
    """Returns the full symmetric matrix."""
    top, corner = halves
    if not corner.size:
        return top
    below = jnp.concatenate([top[..., top.shape[-2] :].mT, corner], axis=-1)
    return jnp.concatenate([top, below], axis=-2)
