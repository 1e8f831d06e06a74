"""Parameters of blocks one by one, `blocks.0.ffn.up.kernel`, or stacked, `[L, ...]`.

Stacked they are run by one `jax.lax.scan`, whose program does not grow with L.
"""

from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]


def stack_layers(params: Params) -> Params:
    """Returns parameters as a model with `scan_layers` has them.

    Example:
      >>> kernel = jnp.ones((2, 3))
      >>> params = {"blocks": {0: {"kernel": kernel}, 1: {"kernel": kernel}}}
      >>> stack_layers(params)["blocks"]["kernel"].shape
      (2, 2, 3)

    Args:
      params: Parameters, or a tree like them such as gradients, of a model without.

    Returns:
      The same, where `blocks` has arrays with L as their first axis.
    """
    blocks = [params["blocks"][i] for i in range(len(params["blocks"]))]
    return {**params, "blocks": stack_trees(blocks)}


def unstack_layers(params: Params) -> Params:
    """Returns parameters as a model without `scan_layers` has them.

    Example:
      >>> params = {"blocks": {"kernel": jnp.ones((2, 2, 3))}}
      >>> unstack_layers(params)["blocks"][1]["kernel"].shape
      (2, 3)

    Args:
      params: Parameters, or a tree like them such as gradients, of a model with it.

    Returns:
      The same, where `blocks` has one tree by number of the layer, from 0.
    """
    return {**params, "blocks": dict(enumerate(unstack_trees(params["blocks"])))}


def stack_trees(trees: list[Any]) -> Any:
    """Returns one tree of arrays `[L, ...]` for L trees of arrays `[...]`."""
    stack: Any = lambda *xs: jnp.stack(xs)
    return jax.tree.map(stack, *trees)


def unstack_trees(stacked: Any) -> list[Any]:
    """Returns L trees of arrays `[...]` for one tree of arrays `[L, ...]`."""
    n_layers = len(jax.tree.leaves(stacked)[0])
    pick = lambda i: jax.tree.map(lambda x: x[i], stacked)
    return [pick(i) for i in range(n_layers)]
