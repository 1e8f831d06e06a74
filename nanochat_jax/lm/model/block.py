"""A transformer block: attention with rotary positions, and a SwiGLU layer.

Every kernel is a matrix `(in, out)` without bias, so that a matrix optimizer sees
matrices. The only state is `nnx.Param`.

Axes: B batch, S sequence, T cache, D model, N query heads, K key and value heads, H
head size, F feed-forward.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from nanochat_jax.config import ModelConfig
from nanochat_jax.lm.model.attention import causal_attention, largest_scores, rotate
from nanochat_jax.lm.model.recomputed import Recomputed, as_recomputed, multiply
from nanochat_jax.lm.model.ternary import TernaryLinear

Linear = Callable[..., nnx.Linear | TernaryLinear]


class TensorSplit(NamedTuple):
    """Axis of a kernel that the mesh axis `tensor` divides, see `param_sharding`.

    Attributes:
      axis: The divided axis, the one that is not the residual stream.
      heads: Field of `ModelConfig` with the heads along it, which stay whole; `None`
        if it has no heads.
    """

    axis: Literal["rows", "columns"]
    heads: str | None = None


class LayerCache(NamedTuple):
    """Keys of one layer, normalised and rotated, and its values."""

    keys: Float[Array, "B T K H"]
    values: Float[Array, "B T K H"]


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions, and mostly QK-norm."""

    tensor_splits: ClassVar = {
        "query": TensorSplit("columns", "n_heads"),
        "key": TensorSplit("columns", "kv_heads"),
        "value": TensorSplit("columns", "kv_heads"),
        "out": TensorSplit("rows", "n_heads"),
    }

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        query_dim = config.n_heads * config.head_size
        key_dim = config.kv_heads * config.head_size
        linear = _linear(config, rngs)
        self.query = linear(config.dim, query_dim)
        self.key = linear(config.dim, key_dim)
        self.value = linear(config.dim, key_dim)
        self.out = linear(query_dim, config.dim, kernel_init=_residual_init)
        self.query_norm = _head_norm(config, rngs)
        self.key_norm = _head_norm(config, rngs)
        self.head_size = config.head_size
        self.rope_theta, self.rope_scaling = config.rope_theta, config.rope_scaling
        self.keeps_scores = config.param_dtype != "bfloat16"

    def __call__(
        self,
        x: Float[Array, "B S D"] | Recomputed,
        positions: Int[Array | np.ndarray, "S"],
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B S D"], LayerCache | None]:
        """Returns the attention output, and the cache with `x` added to it."""
        query, key, value = self._heads(x, positions)
        if cache is None:
            y = causal_attention(query, key, value, keep_scores=self.keeps_scores)
            y = Recomputed(_join_heads, (y,))
        else:
            put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
                old, new, positions[0], axis=1
            )
            cache = LayerCache(put(cache.keys, key.value), put(cache.values, value))
            seen = jnp.arange(cache.keys.shape[1])[None, :] <= positions[:, None]
            mask = seen[None, None]
            y = jax.nn.dot_product_attention(query.value, *cache, mask=mask)
            y = y.reshape(*y.shape[:2], -1)
        return _apply(y, self.out)[0], cache

    def largest_scores(
        self, x: Float[Array, "B S D"], positions: Int[Array | np.ndarray, "S"]
    ) -> Float[Array, "N"]:
        """Returns the largest attention score of each query head."""
        query, key, _ = self._heads(x, positions)
        return largest_scores(query.value, key.value)

    def _heads(
        self, x: Array | Recomputed, positions: Array | np.ndarray
    ) -> tuple[Recomputed, Recomputed, Array]:
        """Returns queries, keys and values, the first two normalised and rotated."""
        query, key, value = (
            y.reshape(*y.shape[:-1], -1, self.head_size)
            for y in _apply(x, self.query, self.key, self.value)
        )
        turn = lambda y: rotate(y, positions, self.rope_theta, self.rope_scaling)
        query, key = _normed(self.query_norm, query), _normed(self.key_norm, key)
        return query.then(turn), key.then(turn), value


class FeedForward(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    tensor_splits: ClassVar = {
        "gate": TensorSplit("columns"),
        "up": TensorSplit("columns"),
        "down": TensorSplit("rows"),
    }

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        linear = _linear(config, rngs)
        self.gate = linear(config.dim, config.ffn_dim)
        self.up = linear(config.dim, config.ffn_dim)
        self.down = linear(config.ffn_dim, config.dim, kernel_init=_residual_init)

    def __call__(self, x: Float[Array, "B S D"] | Recomputed) -> Float[Array, "B S D"]:
        """Returns the output of the layer at each position."""
        inputs = tuple(_apply(x, self.gate, self.up))
        return _apply(Recomputed(_gated, inputs), self.down)[0]


class Block(nnx.Module):
    """Attention and feed-forward, each on a normalised copy of the residual stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = norm(config, config.dim, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.ffn_norm = norm(config, config.dim, rngs)
        self.ffn = FeedForward(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array | np.ndarray, "S"],
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B S D"], LayerCache | None]:
        """Returns the residual stream after this block, and the cache."""
        y, cache = self.attention(_normed(self.attention_norm, x), positions, cache)
        x = x + y
        return x + self.ffn(_normed(self.ffn_norm, x)), cache


def norm(
    config: ModelConfig, size: int, rngs: nnx.Rngs, *, use_scale: bool = True
) -> nnx.RMSNorm:
    """Returns a root-mean-square norm over the last axis.

    Args:
      config: Arithmetic of the model.
      size: Entries of the last axis.
      rngs: Random streams of the initialisation.
      use_scale: Whether it has a gain.
    """
    dtype = jnp.dtype(config.compute_dtype)
    return nnx.RMSNorm(
        size, epsilon=config.norm_eps, use_scale=use_scale, dtype=dtype, rngs=rngs
    )


def _head_norm(config: ModelConfig, rngs: nnx.Rngs) -> Callable[[Array], Array]:
    """Returns the norm of queries or of keys."""
    if config.qk_norm == "none":
        return _unchanged
    # Without a gain the logits stay within sqrt(H), which is what QK-norm is for.
    return norm(config, config.head_size, rngs, use_scale=config.qk_norm == "gain")


def _unchanged(x: Array) -> Array:
    return x


# Kernels that write to the residual stream start near zero, so that it carries the
# embedding at first: worth 0.08 nats over scaling by depth in 200 steps of Muon on
# bytes. Not at zero, where the first gradients of the other kernels would vanish, and a
# low-rank basis of them would be arbitrary.
_residual_init = nnx.initializers.variance_scaling(1e-4, "fan_in", "normal")


def _linear(config: ModelConfig, rngs: nnx.Rngs) -> Linear:
    """Returns the constructor of the linear layers of a block."""
    dtype = jnp.dtype(config.compute_dtype)
    if config.ternary:
        return functools.partial(
            TernaryLinear, group_size=config.group_size, dtype=dtype, rngs=rngs
        )
    return functools.partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)


def _normed(norm: Callable[[Array], Array], x: Float[Array, "..."]) -> Recomputed:
    if not isinstance(norm, nnx.RMSNorm):
        return as_recomputed(x)
    scale = () if norm.scale is None else (norm.scale[...],)
    return Recomputed(
        functools.partial(_rms_norm, norm.epsilon, norm.dtype), (x, *scale)
    )


def _rms_norm(epsilon: float, dtype: Any, x: Array, *scale: Array) -> Array:
    """Returns what `nnx.RMSNorm` does, with the gain if there is one.

    Written out, since Flax subtracts a mean of zeros, and JAX up to 0.12 confuses what
    a scan keeps for second derivatives of such a gradient.
    """
    x = x.astype(dtype).astype(jnp.promote_types(dtype, jnp.float32))
    squares = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    factor = jax.lax.rsqrt(squares + epsilon)
    for gain in scale:
        gain = gain.astype(dtype).astype(x.dtype)
        factor *= gain.reshape(*[1] * (x.ndim - 1), -1)
    return (x * factor).astype(dtype)


def _gated(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def _join_heads(y: Float[Array, "B N S H"]) -> Float[Array, "B S D"]:
    return y.transpose(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], -1)


def _apply(x: Array | Recomputed, *linears: nnx.Linear | TernaryLinear) -> list[Array]:
    """Returns the results of linear layers of one input."""
    plain = [linear for linear in linears if isinstance(linear, nnx.Linear)]
    if len(plain) < len(linears):
        value = as_recomputed(x).value
        return [linear(value) for linear in linears]
    dtype = plain[0].dtype
    return multiply(x, [linear.kernel[...].astype(dtype) for linear in plain])
