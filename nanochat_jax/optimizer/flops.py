"""Floating-point operations of an optimizer's update, counted from shapes."""

import math
from typing import Any

import jax
import optax

from nanochat_jax import numerics
from nanochat_jax.config import OptimizerConfig
from nanochat_jax.numerics import (
    POLYNOMIALS,
    range_basis_flops,
    resolve_dtype,
)
from nanochat_jax.optimizer.roles import matrices_of, settle
from nanochat_jax.optimizer.storage import rank_of


def update_flops(
    config: OptimizerConfig, params: optax.Params, matrix_axes: Any = None
) -> dict[str, int]:
    """Counts the products of one update of the matrices.

    Elementwise operations are left out: memory bounds their time.

    Args:
      config: Settings of the optimizer.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.
      matrix_axes: As for `build_optimizer`.

    Returns:
      Operations by part: `newton_schulz`, `projection`, and `refresh`, the operations
      of a change of basis divided by the steps between two changes.
    """
    roles = settle(params, matrix_axes=matrix_axes, freeze=config.freeze)
    matrices = matrices_of(params, roles)
    total = {"newton_schulz": 0, "projection": 0, "refresh": 0}
    for x in jax.tree.leaves(matrices):
        for part, count in _leaf_flops(config, x.shape).items():
            total[part] += count
    return total


def _leaf_flops(config: OptimizerConfig, shape: tuple[int, ...]) -> dict[str, int]:
    rank = rank_of(config, shape)
    if rank is None:
        return {"newton_schulz": newton_schulz_flops(config, shape)}
    count, (short, long) = math.prod(shape[:-2]), sorted(shape[-2:])
    inside = shape if config.galore_residual else (count, rank, long)
    refresh = range_basis_flops((count, short, long), rank)
    return {
        "newton_schulz": newton_schulz_flops(config, inside),
        "projection": count * 2 * 2 * short * long * rank,
        "refresh": refresh // config.galore_update_freq,
    }


def newton_schulz_flops(config: OptimizerConfig, shape: tuple[int, ...]) -> int:
    """Returns the operations of a configuration's Newton-Schulz iteration.

    Args:
      config: Settings of the optimizer.
      shape: Shape of the matrices, `[*batch, m, n]`.
    """
    polynomials = POLYNOMIALS[config.ns_method].take(config.ns_steps)
    dtype = resolve_dtype(config.ns_dtype)
    return numerics.newton_schulz_flops(shape, polynomials, dtype=dtype)
