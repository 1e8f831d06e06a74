"""The loss of a model, as one function and as functions around its stacked blocks."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float32, Int, Int32

from nanochat_jax.lm.model import activation_sharding
from nanochat_jax.lm.model.gpt import GPT
from nanochat_jax.lm.model.layer_stacking import Params


def next_token_loss(
    graphdef: nnx.GraphDef[GPT],
    params: Params,
    batch: Int[Array, "B length"],
    predictions: ArrayLike | None = None,
) -> Float32[Array, ""]:
    """Returns the mean cross-entropy, in nats, of each token given its context.

    Args:
      graphdef: Structure of the model, from `init`.
      params: Its parameters.
      batch: Token ids `[B, S + 1]`. The first of a row is only read, the last only
        predicted; a token that is not predicted is given as its complement, `~id`.
      predictions: As for `cross_entropy`.

    Returns:
      The mean over all predictions.
    """
    model = nnx.merge(graphdef, params)
    return model.mean_loss(model.features(batch[:, :-1]), batch[:, 1:], predictions)


def count_predictions(batch: Int[Array, "*batch length"]) -> Int32[Array, ""]:
    """Returns the number of tokens of a batch that are predicted.

    Args:
      batch: As for `next_token_loss`.
    """
    return jnp.sum(batch[..., 1:] >= 0)


def as_functions(
    graphdef: nnx.GraphDef[GPT], params: Params
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Returns the loss of a model as functions before, of and after its stacked blocks.

    They are those of `update_in_backward`, and together `next_token_loss`, for pairs of
    a batch, `[B, S + 1]`, and the number of predictions that the loss is divided by.

    Args:
      graphdef: Structure of the model, from `init`, with `scan_layers`.
      params: Shapes of its parameters.
    """
    like = params["blocks"]
    whole = lambda rest: nnx.merge(graphdef, {**rest, "blocks": like})
    block_def = nnx.graphdef(nnx.merge(graphdef, params).blocks)

    def embed(rest: Params, batch: tuple[Array, Array]) -> Array:
        return whole(rest).look_up(batch[0][:, :-1])

    def block(layer: Params, x: Array) -> Array:
        positions = np.arange(x.shape[1], dtype=np.int32)
        y, _ = nnx.merge(block_def, layer)(x, positions)
        return activation_sharding.divide_sequences(y)

    def head(rest: Params, x: Array, batch: tuple[Array, Array]) -> Array:
        model, (tokens, predictions) = whole(rest), batch
        return model.mean_loss(model.final_norm(x), tokens[:, 1:], predictions)

    return embed, block, head
