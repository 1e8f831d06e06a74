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
from nanochat_jax.optimizer.storage import projector_cost
from nanochat_jax.transforms import projection


def update_flops(
    config: OptimizerConfig, params: optax.Params, matrix_axes: Any = None
) -> dict[str, int]:
    """Counts the products of one update of the matrices.

    Elementwise work is left out; it is bound by memory, not by operations.

    Args:
      config: What the optimizer is.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.
      matrix_axes: As for `build_optimizer`.

    Returns:
      Operations by part: `newton_schulz`, `projection`, and `refresh`, the change of
      basis divided by the steps between two.
    """
    matrices = matrices_of(params, settle(params, matrix_axes=matrix_axes))
    ranks = jax.tree.map(lambda _: 0, matrices)
    if config.use_galore:
        ranks = projection.ranks(matrices, config.rank)
    total = {"newton_schulz": 0, "projection": 0, "refresh": 0}
    for x, rank in zip(*map(jax.tree.leaves, (matrices, ranks)), strict=True):
        for part, count in _leaf_flops(config, x.shape, rank).items():
            total[part] += count
    return total


def _leaf_flops(
    config: OptimizerConfig, shape: tuple[int, ...], wanted: int
) -> dict[str, int]:
    rank = wanted and projection.projected_rank(shape, wanted, projector_cost(config))
    if not rank:
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
    """Returns the operations of Newton-Schulz as `config` has it.

    Args:
      config: What the optimizer is.
      shape: Shape of the matrices, `[*batch, m, n]`.
    """
    polynomials = POLYNOMIALS[config.ns_method].take(config.ns_steps)
    dtype = resolve_dtype(config.ns_dtype)
    return numerics.newton_schulz_flops(shape, polynomials, dtype=dtype)
