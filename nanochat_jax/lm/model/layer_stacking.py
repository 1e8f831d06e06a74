"""Parameters of blocks one by one, `blocks.0.ffn.up.kernel`, or stacked, `[L, ...]`.

One `jax.lax.scan` runs stacked blocks, and its program does not grow with L.
"""

from typing import Any

import jax

Params = dict[str, Any]


def unstack_layers(params: Params) -> Params:
    """Returns parameters of a model with `scan_layers` as those of one without.

    Example:
      >>> params = {"blocks": {"kernel": jnp.ones((2, 2, 3))}}
      >>> unstack_layers(params)["blocks"][1]["kernel"].shape
      (2, 3)

    Args:
      params: Parameters with stacked blocks, or a tree like them such as gradients.

    Returns:
      The same, with one tree per block under its number, from 0.
    """
    return {**params, "blocks": dict(enumerate(unstack_trees(params["blocks"])))}


def unstack_trees(stacked: Any) -> list[Any]:
    """Returns L trees of arrays `[...]` for one tree of arrays `[L, ...]`."""
    n_layers = len(jax.tree.leaves(stacked)[0])
    pick = lambda i: jax.tree.map(lambda x: x[i], stacked)
    return [pick(i) for i in range(n_layers)]
