"""Gradients in the space of `galore`, for accumulating them there."""

from typing import Any

import jax
import optax
from jaxtyping import Array

from nanochat_jax.transforms.galore import projection
from nanochat_jax.transforms.galore.transform import GaloreState
from nanochat_jax.transforms.plain_states import dequantize


def project_gradients(state: optax.OptState, grads: optax.Updates) -> optax.Updates:
    """Returns gradients as the `galore` of a state projects them, `[*batch, r, long]`.

    Projecting is linear, so a mean of projected gradients is the projected mean, and
    takes the memory of the low-rank state to accumulate. Leaves that are not projected
    stay as they are. `tx.update(..., projected=True)` takes the result, on steps that
    change no basis.

    Example:
      >>> params = {"kernel": jnp.ones((64, 256))}
      >>> tx = galore(momentum(), rank=8)
      >>> _, state = tx.update(params, tx.init(params), params)  # the first basis
      >>> low = project_gradients(state, params)
      >>> low["kernel"].shape
      (8, 256)
      >>> updates, state = tx.update(low, state, params, projected=True)

    Args:
      state: State of an optimizer with `galore` anywhere in it, quantised or not.
      grads: Gradients.

    Returns:
      A tree like `grads`.
    """
    is_galore = lambda node: isinstance(node, GaloreState)
    plain = jax.tree.leaves(dequantize(state), is_leaf=is_galore)
    leaves, treedef = jax.tree.flatten(grads)
    for node in filter(is_galore, plain):
        bases: list[Any] = treedef.flatten_up_to(node.basis)
        leaves = [
            projection.project(g, p) if isinstance(p, Array) else g
            for g, p in zip(leaves, bases, strict=True)
        ]
    return treedef.unflatten(leaves)
