"""A GPT decoder in Flax NNX, used through pure functions of its parameters.

Pre-norm blocks with rotary positions, normalised queries and keys, grouped-query
attention and a SwiGLU feed-forward layer. Every kernel is a matrix `(in, out)` without
bias, so that a matrix optimizer sees matrices. The only state is `nnx.Param`.

Axes: B batch, S sequence, T cache, D model, L layers, N query heads, K key and value
heads, H head size, F feed-forward, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int, Int32

from nanochat_jax.config import ModelConfig

Params = dict[str, Any]


class LayerCache(NamedTuple):
    """Keys, normalised and rotated, and values that one layer has computed."""

    keys: Float[Array, "B T K H"]
    values: Float[Array, "B T K H"]


class Cache(NamedTuple):
    """What the model keeps of the tokens it has read.

    Attributes:
      layers: One `LayerCache` a block, each with room for T tokens.
      length: Tokens read. Slots from there on are never attended to.
    """

    layers: tuple[LayerCache, ...]
    length: Int32[Array, ""]


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions and QK-norm."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        key_dim = config.kv_heads * config.head_dim
        linear, norm = _linear(config, rngs), _norm(config, rngs)
        self.query = linear(config.dim, config.dim)
        self.key = linear(config.dim, key_dim)
        self.value = linear(config.dim, key_dim)
        self.out = linear(config.dim, config.dim, kernel_init=_residual_init)
        # Without a gain the logits stay within sqrt(H), which is what QK-norm is for.
        self.head_norm = norm(config.head_dim, use_scale=False)
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "S"],
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B S D"], LayerCache | None]:
        """Returns what each position gathers, and the cache with `x` added to it."""
        query, key, value = (
            linear(x).reshape(*x.shape[:-1], -1, self.head_dim)
            for linear in (self.query, self.key, self.value)
        )
        query = rotate(self.head_norm(query), positions, self.rope_theta)
        key = rotate(self.head_norm(key), positions, self.rope_theta)
        if cache is None:
            y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        else:
            put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
                old, new, positions[0], axis=1
            )
            cache = LayerCache(put(cache.keys, key), put(cache.values, value))
            seen = jnp.arange(cache.keys.shape[1])[None, :] <= positions[:, None]
            y = jax.nn.dot_product_attention(query, *cache, mask=seen[None, None])
        return self.out(y.reshape(*x.shape[:-1], -1)), cache


class FeedForward(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        linear = _linear(config, rngs)
        self.gate = linear(config.dim, config.ffn_dim)
        self.up = linear(config.dim, config.ffn_dim)
        self.down = linear(config.ffn_dim, config.dim, kernel_init=_residual_init)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Returns the transformed positions."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and feed-forward, each on a normalised copy of the residual stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        norm = _norm(config, rngs)
        self.attention_norm = norm(config.dim)
        self.attention = Attention(config, rngs=rngs)
        self.ffn_norm = norm(config.dim)
        self.ffn = FeedForward(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "S"],
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B S D"], LayerCache | None]:
        """Returns the residual stream after this block, and the cache."""
        y, cache = self.attention(self.attention_norm(x), positions, cache)
        x = x + y
        return x + self.ffn(self.ffn_norm(x)), cache


class GPT(nnx.Module):
    """Decoder-only language model."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.remat, self.weight_tied = config.remat, config.weight_tied
        self.embed = nnx.Embed(
            config.vocab_size,
            config.dim,
            dtype=_dtype(config),
            embedding_init=_table_init,
            rngs=rngs,
        )
        self.blocks = nnx.List(Block(config, rngs=rngs) for _ in range(config.n_layers))
        self.final_norm = _norm(config, rngs)(config.dim)
        if not config.weight_tied:
            linear = _linear(config, rngs)
            self.head = linear(config.dim, config.vocab_size, kernel_init=_table_init)

    def __call__(self, tokens: Int[Array, "B S"]) -> Float32[Array, "B S V"]:
        """Returns the logits of the token after each of `tokens`."""
        positions = jnp.arange(tokens.shape[1])
        x, _ = self._run_blocks(tokens, positions, [None] * len(self.blocks))
        return self.logits(x)

    def extend(
        self, tokens: Int[Array, "B S"], cache: Cache
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """Reads `tokens` after those in `cache`.

        Args:
          tokens: Token ids.
          cache: What came before. It must have room for `tokens`.

        Returns:
          The hidden states of `tokens`, and the cache with `tokens` added to it.
        """
        positions = cache.length + jnp.arange(tokens.shape[1])
        x, layers = self._run_blocks(tokens, positions, cache.layers)
        return x, Cache(tuple(layers), cache.length + tokens.shape[1])

    def logits(self, x: Float[Array, "*batch D"]) -> Float32[Array, "*batch V"]:
        """Returns the logits of hidden states."""
        head = self.embed.attend if self.weight_tied else self.head
        return head(x).astype(jnp.float32)

    def _run_blocks(self, tokens, positions, layers):
        run = nnx.remat(Block.__call__) if self.remat else Block.__call__
        x, new_layers = self.embed(tokens), []
        for block, layer in zip(self.blocks, layers, strict=True):
            x, layer = run(block, x, positions, layer)
            new_layers.append(layer)
        return self.final_norm(x), new_layers


def init(config: ModelConfig, seed: ArrayLike) -> tuple[nnx.GraphDef[GPT], Params]:
    """Returns the structure of a model and its initial parameters.

    Under `jax.eval_shape` it allocates nothing; `jax.jit` may give `out_shardings`.

    Args:
      config: Shape and arithmetic.
      seed: Seed of the parameters.

    Returns:
      The static graph definition, and nested dicts of float32 arrays by path, such as
      `params["blocks"][0]["attention"]["query"]["kernel"]`.
    """
    graphdef, state = nnx.split(GPT(config, rngs=nnx.Rngs(jax.random.key(seed))))
    return graphdef, nnx.to_pure_dict(state)


def init_cache(config: ModelConfig, batch_size: int, max_len: int) -> Cache:
    """Returns an empty cache for `batch_size` sequences of up to `max_len` tokens."""
    shape = (batch_size, max_len, config.kv_heads, config.head_dim)
    empty = lambda: jnp.zeros(shape, _dtype(config))
    layers = tuple(LayerCache(empty(), empty()) for _ in range(config.n_layers))
    return Cache(layers, jnp.zeros([], jnp.int32))


def apply(
    graphdef: nnx.GraphDef[GPT], params: Params, tokens: Int[Array, "B S"]
) -> Float32[Array, "B S V"]:
    """Returns the logits of the token after each of `tokens`.

    Args:
      graphdef: Structure of the model, from `init`.
      params: Its parameters.
      tokens: Token ids below V; larger ones give NaN, so check them on the host.

    Returns:
      Logits; those at position `i` have seen `tokens[:, :i + 1]`.
    """
    return nnx.merge(graphdef, params)(tokens)


def next_token_loss(
    graphdef: nnx.GraphDef[GPT], params: Params, batch: Int[Array, "B length"]
) -> Float32[Array, ""]:
    """Returns the mean cross-entropy, in nats, of each token given those before it.

    Args:
      graphdef: Structure of the model, from `init`.
      params: Its parameters.
      batch: Token ids `[B, S + 1]`. The first of a row is read only, the last
        predicted only.

    Returns:
      The mean over B times S predictions.
    """
    logits = apply(graphdef, params, batch[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return losses.mean()


def count_flops_per_token(config: ModelConfig, seq_len: int | None = None) -> int:
    """Returns the floating-point operations of training on one token.

    `6 * M + 12 * L * D * S`: two operations a multiply-add, once forward and twice
    backward, for the M entries of the kernels and head, and for query-key and
    weight-value products over S positions. As is usual, the masked half of attention
    counts, while look-ups, norms, the optimizer and recomputation do not.

    Args:
      config: Shape of the model.
      seq_len: Tokens in a sequence, S; `config.max_seq_len` if not given.
    """
    seq_len = config.max_seq_len if seq_len is None else seq_len
    key_dim = config.kv_heads * config.head_dim
    block = config.dim * (2 * config.dim + 2 * key_dim + 3 * config.ffn_dim)
    kernels = config.n_layers * block + config.dim * config.vocab_size
    return 6 * kernels + 12 * config.n_layers * config.dim * seq_len


def rotate(
    x: Float[Array, "B S heads H"], positions: Int[Array, "S"], theta: float
) -> Float[Array, "B S heads H"]:
    """Returns heads with rotary positions (Su et al., 2021).

    Turns the pair `(x[i], x[i + H/2])` by the angle `position * theta^(-2i/H)`, so that
    the product of two turned heads depends on the distance of their positions only.

    Args:
      x: Queries or keys, with an even H.
      positions: Position of each element of the sequence.
      theta: Base of the frequencies.

    Returns:
      The turned heads, in the dtype of `x`.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.outer(positions, frequencies)[None, :, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.astype(x.dtype)


# Small, so that the first logits are near zero whether the table is tied or not.
_table_init = nnx.initializers.normal(0.02)
# Kernels that add to the residual stream start near zero, so that at first it carries
# the embedding: worth 0.08 nats over scaling by depth in 200 steps of Muon on bytes.
# Not at zero, as the first gradients of the other kernels would be zero too, and a
# low-rank basis taken from them arbitrary.
_residual_init = nnx.initializers.variance_scaling(1e-4, "fan_in", "normal")


def _linear(config: ModelConfig, rngs: nnx.Rngs) -> Callable[..., nnx.Linear]:
    return functools.partial(
        nnx.Linear, use_bias=False, dtype=_dtype(config), rngs=rngs
    )


def _norm(config: ModelConfig, rngs: nnx.Rngs) -> Callable[..., nnx.RMSNorm]:
    return functools.partial(nnx.RMSNorm, dtype=_dtype(config), rngs=rngs)


def _dtype(config: ModelConfig) -> jnp.dtype:
    return jnp.dtype(config.compute_dtype)
