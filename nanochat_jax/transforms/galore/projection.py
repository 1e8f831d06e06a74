"""Projecting leaves to the space of a basis of their shorter axis, and back.

Axis letters: `short` and `long`, the last two axes of a leaf by size, `r` rank.
"""

import fnmatch
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath, keystr
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32

Rank = int | float | Mapping[str, int | float]
"""A number, a fraction of the shorter axis, or either by pattern of paths."""


def check_rank(rank: Rank) -> None:
    """Refuses what is no rank.

    Raises:
      TypeError: If a rank is not a Python number.
      ValueError: If one is neither at least 1 nor a fraction in (0, 1).
    """
    values = list(rank.values()) if isinstance(rank, Mapping) else [rank]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(
                "`rank` fixes array shapes, so it must be a Python int, or a float for "
                f"a fraction, got {type(value).__name__}. Under "
                "`optax.inject_hyperparams`, list it in `static_args`."
            )
    if not values or not all(
        value >= 1 if isinstance(value, int) else 0 < value < 1 for value in values
    ):
        raise ValueError(
            "`rank` must be an int of at least 1 or a fraction in (0, 1), or a mapping "
            f"of patterns to these, got rank={rank}."
        )


def ranks(params: Any, rank: Rank) -> Any:
    """Returns the rank of each leaf: its own by pattern, fractions worked out.

    Args:
      params: Arrays, or their shapes.
      rank: As for `galore`.

    Returns:
      A tree like `params`, of numbers; 0 for vectors.

    Raises:
      ValueError: If no pattern of `rank` matches a matrix.
    """
    missing = [
        f"  {_slashed(path)}"
        for path, x in jax.tree.leaves_with_path(params)
        if len(x.shape) > 1 and _matching(path, rank) is None
    ]
    if missing and isinstance(rank, Mapping):
        raise ValueError(
            f"`rank` has the patterns {list(rank)}, none of which matches\n"
            + "\n".join(missing)
            + '\nAdd one, such as "*" for the rest.'
        )

    def resolve(path: KeyPath, x: Array) -> int:
        value = _matching(path, rank)
        if value is None or len(x.shape) < 2:
            return 0
        short = min(x.shape[-2:])
        return value if isinstance(value, int) else max(1, round(value * short))

    return jax.tree.map_with_path(resolve, params)


def _matching(path: KeyPath, rank: Rank) -> int | float | None:
    if not isinstance(rank, Mapping):
        return rank
    name = _slashed(path)
    for pattern, value in rank.items():
        if any(fnmatch.fnmatchcase(x, pattern) for x in (name, *name.split("/"))):
            return value
    return None


def _slashed(path: KeyPath) -> str:
    return keystr(path, simple=True, separator="/")


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
    if len(shape) < 2 or 0 in shape:
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


def norm_ratio(u: Array, low: Array) -> Float32[Array, "*batch 1 1"]:
    """Returns `‖u‖ / ‖low‖` of each matrix, 0 where `low` is zero."""
    size, largest = _norm(low)
    of_u, largest_of_u = _norm(u)
    ratio = (of_u / jnp.where(size > 0, size, 1.0)) * (
        largest_of_u / jnp.where(size > 0, largest, 1.0)
    )
    return jnp.where(size > 0, ratio, 0.0)


def _norm(x: Array) -> tuple[Array, Array]:
    """Returns norms of matrices over their largest entries, and these."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    unit = x / jnp.where(largest > 0, largest, 1.0)
    return jnp.linalg.norm(unit, axis=(-2, -1), keepdims=True), largest


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
