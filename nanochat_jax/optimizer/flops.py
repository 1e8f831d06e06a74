"""Floating-point operations of an optimizer's update, counted from shapes."""

import math
from typing import Any

import jax
import optax

from nanochat_jax import numerics
from nanochat_jax.config import OptimizerConfig
from nanochat_jax.numerics import (
    Fractions,
    method_of,
    range_basis_flops,
    resolve_dtype,
    zolotarev_flops,
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
      of a change of basis divided by the steps between two changes; and
      `precondition`, if there is that.
    """
    roles = settle(
        params, matrix_axes=matrix_axes, freeze=config.freeze, groups=config.groups
    )
    matrices = matrices_of(params, roles)
    total = {"newton_schulz": 0, "projection": 0, "refresh": 0}
    for x in jax.tree.leaves(matrices):
        for part, count in _leaf_flops(config, x.shape).items():
            total[part] = total.get(part, 0) + count
    return total


def _leaf_flops(config: OptimizerConfig, shape: tuple[int, ...]) -> dict[str, int]:
    rank = rank_of(config, shape)
    count, (short, long) = math.prod(shape[:-2]), sorted(shape[-2:])
    sides = _precondition_flops(config, count, short if rank is None else rank, long)
    if rank is None:
        return {"newton_schulz": newton_schulz_flops(config, shape), **sides}
    inside = shape if config.galore_residual else (count, rank, long)
    refresh = range_basis_flops((count, short, long), rank)
    return {
        "newton_schulz": newton_schulz_flops(config, inside),
        "projection": count * 2 * 2 * short * long * rank,
        "refresh": refresh // config.galore_update_freq,
        **sides,
    }


def _precondition_flops(
    config: OptimizerConfig, count: int, short: int, long: int
) -> dict[str, int]:
    """Returns the operations of `precondition`, if there is that.

    For each side of size d a Gram matrix and three rotations, of gradients, of updates
    and back; at each computation of a basis five products of d x d matrices, and a QR
    decomposition with its orthonormal factor, 8/3 d³.
    """
    if config.precondition is None:
        return {}
    sides = (short, long) if config.precondition == "both" else (short,)
    products = sum(4 * 2 * d * short * long for d in sides)
    bases = sum(38 * d**3 // 3 for d in sides) // config.precondition_every
    return {"precondition": count * (products + bases)}


def newton_schulz_flops(config: OptimizerConfig, shape: tuple[int, ...]) -> int:
    """Returns the operations of a configuration's orthogonalisation.

    Args:
      config: Settings of the optimizer.
      shape: Shape of the matrices, `[*batch, m, n]`.
    """
    method = method_of(config.ns_method, config.ns_steps)
    if isinstance(method, Fractions):
        return zolotarev_flops(shape, method)
    dtype = resolve_dtype(config.ns_dtype)
    return numerics.newton_schulz_flops(shape, method, dtype=dtype)
