"""Projecting leaves to the space of a basis of their shorter axis, and back.

Axis letters: `short` and `long`, the last two axes of a leaf by size, `r` rank.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32


def projected_rank(
    shape: tuple[int, ...],
    rank: int,
    projector_cost: float = 1.0,
    min_saving: float = 0.0,
) -> int | None:
    """Returns the rank to which `galore` projects a leaf, `None` for not at all.

    Args:
      shape: Shape of the leaf.
      rank: As for `galore`.
      projector_cost: As for `galore`.
      min_saving: As for `galore`.
    """
    if len(shape) < 2:
        return None
    short, long = sorted(shape[-2:])
    r = min(rank, short)
    saving = 1 - r * (long + projector_cost * short) / (long * short)
    return r if saving > min_saving else None


def short_first(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch short long"]:
    """Returns `x`, transposed if need be so that its shorter axis comes first."""
    return x if x.shape[-2] <= x.shape[-1] else x.mT


def low_rank_shape(x: Array, basis: Array | None) -> tuple[int, ...]:
    """Returns the shape of `x` in the space of `basis`, `[*batch, r, long]`."""
    if basis is None:
        return x.shape
    return (*x.shape[:-2], basis.shape[-1], max(x.shape[-2:]))


def matmul(x: Array, y: Array) -> Float32[Array, "*batch m n"]:
    """Returns the product in float32."""
    # Highest: a rounded projection would not be one.
    return jnp.matmul(x.astype(jnp.float32), y.astype(jnp.float32), precision="highest")


def project(g: Array, basis: Array | None) -> Array:
    """Returns `PᵀG`, or `G` itself without a basis, in float32."""
    g = g.astype(jnp.float32)
    return g if basis is None else matmul(basis.mT, short_first(g))


def project_back(
    g: Array, low: Array, u: Array, basis: Array, scale: ArrayLike, residual: ArrayLike
) -> Array:
    """Returns `scale·P·u + residual·(g - P·low)`, with one product by `P`."""
    if isinstance(residual, int | float) and residual == 0:
        full = matmul(basis, u * scale)
        return full if g.shape[-2] <= g.shape[-1] else full.mT
    full = matmul(basis, u * scale - low * residual)
    full = full if g.shape[-2] <= g.shape[-1] else full.mT
    return full + g.astype(jnp.float32) * residual
