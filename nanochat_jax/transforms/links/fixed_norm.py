"""Matrices that keep their norm: steps on a sphere."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from nanochat_jax.transforms import checks, precision
from nanochat_jax.transforms.sharding import in_auto_mode


def fix_norms() -> optax.GradientTransformationExtraArgs:
    """Shortens or lengthens each matrix after its update to the norm that it had.

    With weights `w` and update `u` of a matrix, the new weights are `w + u`, scaled to
    the Frobenius norm of `w`: steps on a sphere, as in "Hyperball"
    (arXiv:2606.16899). The size of weights is then the initial one for good, and weight
    decay changes their direction alone. Updates are not scaled to these norms: rates
    are others than without it, and `floor_updates` before the rate sets a least
    relative change. Matrices of zeros, which have no direction, are updated as they
    would be without it, and keep the norm that they then have.

    It stands after the learning rate, and before `round_updates` and `split_master`,
    whose rounding moves norms by as much as it moves weights.

    Example:
      >>> tx = optax.chain(optax.sgd(0.5), fix_norms())
      >>> params = {"kernel": jnp.eye(2)}
      >>> updates, _ = tx.update({"kernel": jnp.ones((2, 2))}, tx.init(params), params)
      >>> round(float(jnp.linalg.norm(params["kernel"] + updates["kernel"])) ** 2, 4)
      2.0

    Returns:
      A transformation without state.

    Raises:
      ValueError: At `init` and `update`, if a leaf has fewer than two axes; at
        `update`, if it is given no parameters.
      TypeError: At `init`, if a leaf is complex.
    """

    def init_fn(params: optax.Params) -> optax.EmptyState:
        checks.require_matrices(params, "fix_norms")
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        params = checks.require_params(params, "fix_norms")
        wide, weights = precision.widened(updates), precision.widened(params)
        fixed = jax.tree.map(_on_sphere, wide, weights)
        return precision.cast_like(fixed, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, in_auto_mode(update_fn))


def _on_sphere(u: Array, w: Array) -> Array:
    """Returns the update that leads from `w` to the direction of `w + u`, as long."""
    norm = lambda x: jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    whole = w + u
    radius, size = norm(w), norm(whole)
    both = (radius > 0) & (size > 0)
    # Not `whole·scale - w`: the difference of near numbers would lose their digits.
    excess = jnp.where(both, (radius - size) / jnp.where(both, size, 1), 0)
    return u + excess.astype(u.dtype) * whole
