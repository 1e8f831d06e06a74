"""A GPT decoder in Flax NNX, used through pure functions of its parameters.

Pre-norm blocks with rotary positions, normalised queries and keys, grouped-query
attention and a SwiGLU feed-forward layer; `block` has the layers. With `scan_layers`
the parameters of all blocks are stacked, `[L, ...]`, and run by one loop.

Axes: B batch, S sequence, T cache, D model, L layers, K key and value heads, H head
size, V vocabulary. The embedding and the head are padded from V to `table_size`.
"""

from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int, Int32

from nanochat_jax.config import ModelConfig
from nanochat_jax.lm.model import activation_sharding
from nanochat_jax.lm.model.block import Block, LayerCache, TensorSplit, norm
from nanochat_jax.lm.model.layer_stacking import Params, unstack_trees
from nanochat_jax.lm.model.loss import cross_entropy
from nanochat_jax.lm.model.table import ReadOut, take_rows

M = TypeVar("M", bound=nnx.Module)

# Small, so that the first logits are near zero, with tied weights or without.
_table_init = nnx.initializers.normal(0.02)


class Cache(NamedTuple):
    """Keys and values of the tokens read so far.

    Attributes:
      layers: One `LayerCache` per block, with room for T tokens; if the blocks are
        stacked, one for all with arrays `[L, B, T, K, H]`.
      length: Tokens read. Slots from there on are masked.
    """

    layers: tuple[LayerCache, ...] | LayerCache
    length: Int32[Array, ""]


class GPT(nnx.Module):
    """Decoder-only language model."""

    tensor_splits: ClassVar = {
        "embedding": TensorSplit("rows"),
        "head": TensorSplit("columns"),
    }

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.remat, self.weight_tied = config.remat, config.weight_tied
        self.n_layers, self.loss_chunk = config.n_layers, config.loss_chunk
        self.vocab_size = config.vocab_size
        self.dtype = dtype = jnp.dtype(config.compute_dtype)
        self.embed = nnx.Embed(
            config.table_size,
            config.dim,
            dtype=dtype,
            embedding_init=_table_init,
            rngs=rngs,
        )
        _cast(self.embed, config)
        blocks = _stacked_blocks(config, rngs)
        self.blocks = blocks if config.scan_layers else nnx.List(_unstack(blocks))
        self.final_norm = _cast(norm(config, config.dim, rngs), config)
        if not config.weight_tied:
            self.head = nnx.Linear(
                config.dim,
                config.table_size,
                use_bias=False,
                dtype=dtype,
                kernel_init=_table_init,
                rngs=rngs,
            )
            _cast(self.head, config)

    def __call__(self, tokens: Int[Array, "B S"]) -> Float32[Array, "B S V"]:
        """Returns the logits of the token after each of `tokens`."""
        return self.logits(self.features(tokens))

    def features(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Returns the hidden states of `tokens`, the input of `logits`."""
        positions = np.arange(tokens.shape[1], dtype=np.int32)
        caches = None if self.scans else [None] * self.n_layers
        return self._run_blocks(tokens, positions, caches)[0]

    def extend(
        self, tokens: Int[Array, "B S"], cache: Cache
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """Reads `tokens` after those in `cache`.

        Args:
          tokens: Token ids.
          cache: Cache of the tokens before, with room for `tokens`.

        Returns:
          The hidden states of `tokens`, and the cache with `tokens` added to it.
        """
        positions = cache.length + jnp.arange(tokens.shape[1])
        x, layers = self._run_blocks(tokens, positions, cache.layers)
        return x, Cache(layers, cache.length + tokens.shape[1])

    def logits(self, x: Float[Array, "*batch D"]) -> Float32[Array, "*batch V"]:
        """Returns the logits of hidden states."""
        table = self._gathered(self._table, x)
        return self._read_out.logits(table, x)[..., : self.vocab_size]

    def mean_loss(
        self,
        x: Float[Array, "B S D"],
        labels: Int[Array, "B S"],
        predictions: ArrayLike | None = None,
    ) -> Float32[Array, ""]:
        """Returns the mean cross-entropy of labels, in nats.

        Args:
          x: Hidden states, from `features`.
          labels: Token ids; those below zero are not predicted.
          predictions: As for `cross_entropy`.
        """
        summed = lambda table, x, labels: self._read_out.loss(
            self._gathered(table, x), x, labels
        )
        chunk = self.loss_chunk
        return cross_entropy(summed, self._table, x, labels, chunk, predictions)

    @property
    def scans(self) -> bool:
        """Whether the parameters of the blocks are stacked."""
        return isinstance(self.blocks, Block)

    @property
    def _table(self) -> Array:
        return (self.embed.embedding if self.weight_tied else self.head.kernel)[...]

    def _gathered(self, table: Array, x: Array) -> Array:
        gather = lambda table: activation_sharding.gather_columns(table, x.dtype)
        return gather(table) if self.weight_tied else table

    @property
    def _read_out(self) -> ReadOut:
        return ReadOut(0 if self.weight_tied else 1, self.vocab_size)

    def look_up(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Returns the hidden states before the first block, of ids or complements."""
        table = activation_sharding.divide_columns(self.embed.embedding[...])
        x = take_rows(table, jnp.maximum(tokens, ~tokens)).astype(self.dtype)
        return activation_sharding.columns_to_sequences(x)

    def _run_blocks(self, tokens: Array, positions: ArrayLike, caches: Any) -> Any:
        """Returns the normalised residual stream, and the caches of the blocks."""
        blocks: Any = self.blocks
        graphdef = nnx.graphdef(blocks if self.scans else blocks[0])

        def run(x: Array, layer: Any) -> tuple[Array, LayerCache | None]:
            params, cache = layer
            x, cache = nnx.merge(graphdef, params)(x, positions, cache)
            return activation_sharding.divide_sequences(x), cache

        if self.remat or self.scans:
            # A loop stores its residuals for every block. Of these only the products
            # with kernels take longer to compute than to store.
            kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            policy = None if self.remat else kept
            # In a loop the compiler has nothing to reuse in place of recomputing.
            run = jax.checkpoint(run, policy=policy, prevent_cse=not self.scans)
        x = self.look_up(tokens)
        if self.scans:
            x, caches = jax.lax.scan(run, x, (nnx.state(blocks), caches))
            return self.final_norm(x), caches
        new_caches = []
        for block, cache in zip(blocks, caches, strict=True):
            x, cache = run(x, (nnx.state(block), cache))
            new_caches.append(cache)
        return self.final_norm(x), tuple(new_caches)


def init(config: ModelConfig, seed: ArrayLike) -> tuple[nnx.GraphDef[GPT], Params]:
    """Returns the structure of a model and its initial parameters.

    Under `jax.eval_shape` it allocates nothing; `jax.jit` may give `out_shardings`.

    Args:
      config: Shape and arithmetic of the model.
      seed: Seed of the parameters.

    Returns:
      The static graph definition, and nested dicts of arrays by path, such as
      `params["blocks"][0]["attention"]["query"]["kernel"]`.
    """
    graphdef, state = nnx.split(GPT(config, rngs=nnx.Rngs(jax.random.key(seed))))
    return graphdef, nnx.to_pure_dict(state)


def init_cache(config: ModelConfig, batch_size: int, max_len: int) -> Cache:
    """Returns an empty cache.

    Args:
      config: Shape of the model.
      batch_size: Sequences, B.
      max_len: Most tokens of a sequence, T.
    """
    shape = (batch_size, max_len, config.kv_heads, config.head_size)
    empty = lambda *stack: jnp.zeros((*stack, *shape), config.compute_dtype)
    if config.scan_layers:
        layers = LayerCache(empty(config.n_layers), empty(config.n_layers))
    else:
        layers = tuple(LayerCache(empty(), empty()) for _ in range(config.n_layers))
    return Cache(layers, jnp.zeros([], jnp.int32))


def apply(
    graphdef: nnx.GraphDef[GPT], params: Params, tokens: Int[Array, "B S"]
) -> Float32[Array, "B S V"]:
    """Returns the logits of the token after each of `tokens`.

    Args:
      graphdef: Structure of the model, from `init`.
      params: Its parameters.
      tokens: Token ids below V; larger ids give NaN, so check them on the host.

    Returns:
      Logits; position `i` depends on `tokens[:, :i + 1]`.
    """
    return nnx.merge(graphdef, params)(tokens)


def without_padding(config: ModelConfig, params: Params) -> Params:
    """Returns parameters with the padding of the vocabulary removed.

    Args:
      config: Shape of the model.
      params: Its parameters.
    """
    rows = params["embed"]["embedding"][: config.vocab_size]
    cut: Params = {**params, "embed": {"embedding": rows}}
    if not config.weight_tied:
        cut["head"] = {"kernel": params["head"]["kernel"][:, : config.vocab_size]}
    return cut


def _stacked_blocks(config: ModelConfig, rngs: nnx.Rngs) -> Block:
    """Returns one block with the arrays of all blocks, `[L, ...]`.

    Initialised in a loop: a GPU takes half a second to compile the random numbers of
    each kernel.
    """
    make = nnx.scan(
        lambda rngs: (rngs, _cast(Block(config, rngs=rngs), config)),
        in_axes=nnx.Carry,
        out_axes=(nnx.Carry, 0),
        length=config.n_layers,
    )
    return make(rngs)[1]


def _cast(module: M, config: ModelConfig) -> M:
    """Returns a module with its parameters in the type of the configuration."""
    cast = lambda x: x.astype(config.param_dtype)
    nnx.update(module, jax.tree.map(cast, nnx.state(module)))
    return module


def _unstack(blocks: Block) -> list[Block]:
    graphdef, state = nnx.split(blocks)
    return [nnx.merge(graphdef, layer) for layer in unstack_trees(state)]


def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef[GPT], Params]:
    """Returns the structure of a model, and its parameters as shapes and types.

    Args:
      config: Shape and arithmetic of the model.
    """
    graphdef = None

    def make() -> Params:
        nonlocal graphdef
        graphdef, params = init(config, seed=0)  # shapes do not depend on it
        return params

    params = jax.eval_shape(make)
    assert graphdef is not None
    return graphdef, params
