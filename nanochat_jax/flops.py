"""Floating-point operations of an optimizer's update, counted from shapes."""

import math

import jax
import optax

from nanochat_jax.coefficients import POLYNOMIALS
from nanochat_jax.config import OptimizerConfig
from nanochat_jax.labels import label_params
from nanochat_jax.linalg import newton_schulz_flops, resolve_dtype
from nanochat_jax.optimizer import projector_cost
from nanochat_jax.transforms.projection import projected_rank

OVERSAMPLE, POWER_STEPS = 8, 2
"""What `galore` takes if not told otherwise."""


def update_flops(config: OptimizerConfig, params: optax.Params) -> dict[str, int]:
    """Counts the products of one update of the matrices.

    Elementwise work is left out; it is bound by memory, not by operations.

    Args:
      config: What the optimizer is.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      Operations by part: `newton_schulz`, `projection`, and `refresh`, the change of
      basis divided by the steps between two.
    """
    labels = jax.tree.leaves(label_params(params))
    shapes = [
        x.shape
        for x, label in zip(jax.tree.leaves(params), labels, strict=True)
        if label == "matrix"
    ]
    total = {"newton_schulz": 0, "projection": 0, "refresh": 0}
    for shape in shapes:
        rank = None
        if config.use_galore:
            rank = projected_rank(shape, config.rank, projector_cost(config))
        for part, count in _leaf_flops(config, shape, rank).items():
            total[part] += count
    return total


def _leaf_flops(
    config: OptimizerConfig, shape: tuple[int, ...], rank: int | None
) -> dict[str, int]:
    count, (short, long) = math.prod(shape[:-2]), sorted(shape[-2:])
    if rank is None:
        return {"newton_schulz": _newton_schulz(config, shape)}
    inside = (count, rank, long)
    width = min(rank + OVERSAMPLE, short)
    products = 2 + 2 * POWER_STEPS  # of the gradient with a block of columns
    refresh = count * products * 2 * short * long * width
    return {
        "newton_schulz": _newton_schulz(
            config, shape if config.galore_residual else inside
        ),
        "projection": count * 2 * 2 * short * long * rank,
        "refresh": refresh // config.galore_update_freq,
    }


def _newton_schulz(config: OptimizerConfig, shape: tuple[int, ...]) -> int:
    polynomials = POLYNOMIALS[config.ns_method].take(config.ns_steps)
    dtype = resolve_dtype(config.ns_dtype)
    return newton_schulz_flops(shape, polynomials, dtype=dtype)
