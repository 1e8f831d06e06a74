"""The loss of a model as functions before, of and after its stacked blocks."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from nanochat_jax.lm.model import activation_sharding
from nanochat_jax.lm.model.gpt import GPT
from nanochat_jax.lm.model.layer_stacking import Params


def as_functions(
    graphdef: nnx.GraphDef[GPT], params: Params
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Returns the loss of a model as functions before, of and after its stacked blocks.

    They are those of `update_in_backward`, for batches `[B, S + 1]`, and together
    `next_token_loss`.

    Args:
      graphdef: Structure of the model, from `init`, with `scan_layers`.
      params: Shapes of its parameters.
    """
    like = params["blocks"]
    whole = lambda rest: nnx.merge(graphdef, {**rest, "blocks": like})
    block_def = nnx.graphdef(nnx.merge(graphdef, params).blocks)

    def embed(rest: Params, batch: Array) -> Array:
        return whole(rest).look_up(batch[:, :-1])

    def block(layer: Params, x: Array) -> Array:
        y, _ = nnx.merge(block_def, layer)(x, jnp.arange(x.shape[1]))
        return activation_sharding.divide_sequences(y)

    def head(rest: Params, x: Array, batch: Array) -> Array:
        model = whole(rest)
        return model.mean_loss(model.final_norm(x), batch[:, 1:])

    return embed, block, head
