"""Orthogonalised updates: the step that makes momentum into Muon."""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import optax

from nanochat_jax import linalg

ShapeScale = Literal["width", "rms", "none"]


def orthogonalize(
    coefficients: Sequence[linalg.Coefficients] = linalg.QUINTIC,
    *,
    dtype: str = "float32",
) -> optax.GradientTransformation:
    """Replaces each matrix of the updates by the nearest semi-orthogonal one.

    The last two axes are the matrix; the axes before them are a batch. Stateless, so
    Muon is `optax.chain(momentum(), orthogonalize(), scale_by_shape("width"), ...)`.

    Args:
      coefficients: Newton-Schulz coefficients, one `(a, b, c)` for each step.
      dtype: Type of the iteration; the updates keep theirs.

    Returns:
      A stateless transformation.

    Raises:
      ValueError: At `update`, if a leaf has fewer than two axes.
    """

    def update_fn(
        updates: optax.Updates, params: optax.Params | None = None
    ) -> optax.Updates:
        del params
        _require_matrices(updates, "orthogonalize")
        return jax.tree.map(
            lambda x: linalg.newton_schulz(x, coefficients, dtype=dtype), updates
        )

    return optax.stateless(update_fn)


def scale_by_shape(mode: ShapeScale = "width") -> optax.GradientTransformation:
    """Scales each matrix of the updates by a function of its shape.

    Kernels are `[..., fan_in, fan_out]`, as in Flax:

      * `"width"`: `√max(1, fan_out / fan_in)` (Jordan 2024);
      * `"rms"`: `0.2 √max(fan_in, fan_out)`, the root mean square of an AdamW update
        (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2);
      * `"none"`: 1.

    It depends on the parameter's own shape, so it belongs outside `galore`.

    Args:
      mode: One of the above.

    Returns:
      A stateless transformation.

    Raises:
      ValueError: If `mode` is none of the above; at `update`, if a leaf has fewer than
        two axes.
    """
    rules = {
        "width": lambda fan_in, fan_out: math.sqrt(max(1.0, fan_out / fan_in)),
        "rms": lambda fan_in, fan_out: 0.2 * math.sqrt(max(fan_in, fan_out)),
        "none": lambda fan_in, fan_out: 1.0,
    }
    if mode not in rules:
        raise ValueError(f"`mode` must be one of {list(rules)}, got {mode!r}.")

    def update_fn(
        updates: optax.Updates, params: optax.Params | None = None
    ) -> optax.Updates:
        del params
        _require_matrices(updates, "scale_by_shape")
        return jax.tree.map(lambda x: x * rules[mode](*x.shape[-2:]), updates)

    return optax.stateless(update_fn)


def _require_matrices(updates: optax.Updates, who: str) -> None:
    found = [
        f"  {jax.tree_util.keystr(path)} has shape {x.shape}"
        for path, x in jax.tree.leaves_with_path(updates)
        if x.ndim < 2
    ]
    if found:
        raise ValueError(
            f"`{who}` needs leaves of two or more axes, but\n"
            + "\n".join(found)
            + "\nSend them to another transform with `optax.partition`."
        )
