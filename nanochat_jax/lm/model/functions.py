"""Pure functions of a model: loss, operations, parts around blocks, and QK-clip."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int, Int32

from nanochat_jax.config import ModelConfig
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


def count_flops_per_token(config: ModelConfig, seq_len: int | None = None) -> int:
    """Returns the floating-point operations of training on one token.

    `6 * M + 12 * L * N * H * S`: two operations a multiply-add, once forward and twice
    backward, for the M entries of the kernels and head, and for query-key and
    weight-value products of N heads of size H over S positions. By convention the
    masked half of attention counts; look-ups, norms, the optimizer and recomputation
    do not.

    Args:
      config: Shape of the model.
      seq_len: Tokens in a sequence, S; `config.max_seq_len` if not given.
    """
    seq_len = config.max_seq_len if seq_len is None else seq_len
    query_dim = config.n_heads * config.head_size
    key_dim = config.kv_heads * config.head_size
    block = config.dim * (2 * query_dim + 2 * key_dim + 3 * config.ffn_dim)
    kernels = config.n_layers * block + config.dim * config.table_size
    return 6 * kernels + 12 * config.n_layers * query_dim * seq_len


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


def largest_scores(
    graphdef: nnx.GraphDef[GPT], params: Params, tokens: Int[Array, "B S"]
) -> Float32[Array, "L N"]:
    """Returns the largest attention score of each layer and head, in a forward pass.

    Args:
      graphdef: Structure of the model, from `init`.
      params: Its parameters.
      tokens: Token ids, or complements of them.
    """
    model = nnx.merge(graphdef, params)
    positions = np.arange(tokens.shape[1], dtype=np.int32)
    blocks: Any = model.blocks
    block_def = nnx.graphdef(blocks if model.scans else blocks[0])

    def run(x: Array, layer: Any) -> tuple[Array, Array]:
        block = nnx.merge(block_def, layer)
        largest = block.attention.largest_scores(block.attention_norm(x), positions)
        x, _ = block(x, positions)
        return activation_sharding.divide_sequences(x), largest

    x = model.look_up(tokens)
    if model.scans:
        return jax.lax.scan(run, x, nnx.state(blocks))[1]
    found = []
    for block in blocks:
        x, largest = run(x, nnx.state(block))
        found.append(largest)
    return jnp.stack(found)


def clip_attention(
    params: Params, largest: Float[Array, "L N"], threshold: float
) -> Params:
    """Returns parameters whose attention scores would have been at most a threshold.

    QK-clip of MuonClip (Kimi K2, 2025, arXiv:2507.20534, section 2.1): of each head
    with a larger score the kernels of queries and keys are scaled, both by the root of
    what lacks. Of heads that share a key the one with the largest score decides how it
    is scaled, and queries make up for it. All else stays as it is, to the bit.

    Args:
      params: Parameters of a model without norms of queries and keys.
      largest: Largest scores, from `largest_scores`; not above zero for unknown ones.
      threshold: Largest score to keep, such as 100.
    """
    wanted = jnp.where(largest > threshold, threshold / largest, 1.0)
    blocks = params["blocks"]
    if "attention" in blocks:
        return {**params, "blocks": _clip_block(blocks, wanted)}
    items = blocks.items() if isinstance(blocks, dict) else enumerate(blocks)
    clipped = {i: _clip_block(block, wanted[i]) for i, block in items}
    kept = (
        clipped if isinstance(blocks, dict) else [clipped[i] for i in sorted(clipped)]
    )
    return {**params, "blocks": kept}


def _clip_block(block: Params, wanted: Float[Array, "*L N"]) -> Params:
    """Returns one block, or stacked ones, with products of its heads scaled."""
    attention = block["attention"]
    key, query = attention["key"]["kernel"], attention["query"]["kernel"]
    size = query.shape[-1] // wanted.shape[-1]
    groups = query.shape[-1] // key.shape[-1]
    each = wanted.reshape(*wanted.shape[:-1], -1, groups)
    shared = jnp.sqrt(each.min(-1, keepdims=True))

    def scaled(kernel: Array, scale: Array) -> Array:
        columns = jnp.repeat(scale.reshape(*wanted.shape[:-1], -1), size, axis=-1)
        return (kernel * columns[..., None, :]).astype(kernel.dtype)

    clipped = {
        "query": {**attention["query"], "kernel": scaled(query, each / shared)},
        "key": {**attention["key"], "kernel": scaled(key, shared)},
    }
    return {**block, "attention": {**attention, **clipped}}
