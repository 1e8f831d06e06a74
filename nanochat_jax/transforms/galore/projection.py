"""Projecting leaves to the space of a basis of their shorter axis, and back.

Axis letters: `short` and `long`, the last two axes of a leaf by size, `r` rank.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32

Rank = int | float
"""A number of dimensions, or a fraction of the shorter axis in (0, 1)."""


def check_rank(rank: Rank) -> None:
    """Refuses what is no rank.

    Raises:
      TypeError: If it is not a Python number.
      ValueError: If it is neither at least 1 nor a fraction in (0, 1).
    """
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise TypeError(
            "`rank` fixes array shapes, so it must be a Python int, or a float for a "
            f"fraction, got {type(rank).__name__}. Under `optax.inject_hyperparams`, "
            "list it in `static_args`."
        )
    if not (rank >= 1 if isinstance(rank, int) else 0 < rank < 1):
        raise ValueError(
            "`rank` must be an int of at least 1 or a fraction in (0, 1), got "
            f"rank={rank}."
        )


def saves_bytes(shape: tuple[int, ...], rank: int, basis_cost: float = 1.0) -> bool:
    """Returns whether projecting a matrix takes fewer bytes than keeping it whole.

    Low-rank state and basis, `r·long + basis_cost·r·short`, against `long·short`.

    Args:
      shape: Shape of the leaf.
      rank: Dimensions kept.
      basis_cost: Bytes of a stored entry of the basis over those of an entry of the
        wrapped transform's state; 1 if both are float32.
    """
    short, long = sorted(shape[-2:])
    return rank * (long + basis_cost * short) < long * short


def projected_rank(
    shape: tuple[int, ...],
    rank: Rank,
    project: Callable[[tuple[int, ...], int], bool] = saves_bytes,
) -> int | None:
    """Returns the rank to which `galore` projects a leaf, `None` for not at all.

    Args:
      shape: Shape of the leaf.
      rank: As for `galore`.
      project: As for `galore`.
    """
    if len(shape) < 2 or 0 in shape:
        return None
    short = min(shape[-2:])
    whole = rank if isinstance(rank, int) else max(1, round(rank * short))
    r = min(whole, short)
    return r if project(shape, r) else None


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
    if x.ndim == y.ndim == 3 and len(x) == len(y) == 1:
        # Compiled otherwise than as one of several: with the bits of a single matrix.
        return matmul(x[0], y[0])[None]
    # Highest: a rounded projection would not be one.
    return jnp.matmul(x.astype(jnp.float32), y.astype(jnp.float32), precision="highest")


def project(g: Array, basis: Array | None) -> Array:
    """Returns `PᵀG`, or `G` itself without a basis, in float32."""
    g = g.astype(jnp.float32)
    return g if basis is None else matmul(basis.mT, short_first(g))


def lift(
    low: Float[Array, "*batch r long"], basis: Array, shape: tuple[int, ...]
) -> Float32[Array, "*batch m n"]:
    """Returns `P·low`, in float32, for a leaf of that shape."""
    full = matmul(basis, low)
    return full if shape[-2] <= shape[-1] else full.mT


def cut_off(g: Array, low: Array, basis: Array) -> Float32[Array, "*batch m n"]:
    """Returns `G - P·low`."""
    return g.astype(jnp.float32) - lift(low, basis, g.shape)


def project_back(
    g: Array, low: Array, u: Array, basis: Array, scale: ArrayLike, residual: ArrayLike
) -> Array:
    """Returns `scale·P·u + residual·(g - P·low)`, with one product by `P`."""
    if isinstance(residual, int | float) and residual == 0:
        return lift(u * scale, basis, g.shape)
    full = lift(u * scale - low * residual, basis, g.shape)
    return full + g.astype(jnp.float32) * residual
