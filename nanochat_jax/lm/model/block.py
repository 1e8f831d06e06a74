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
from nanochat_jax.lm.model.ternary import TernaryLinear
from nanochat_jax.transforms import after, run_after

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
        x: Float[Array, "B S D"],
        positions: Int[Array | np.ndarray, "S"],
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B S D"], LayerCache | None]:
        """Returns the attention output, and the cache with `x` added to it."""
        query, key, value = self._heads(x, positions)
        if cache is None:
            y = causal_attention(query, key, value, keep_scores=self.keeps_scores)
        else:
            put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
                old, new, positions[0], axis=1
            )
            cache = LayerCache(put(cache.keys, key), put(cache.values, value))
            seen = jnp.arange(cache.keys.shape[1])[None, :] <= positions[:, None]
            y = jax.nn.dot_product_attention(query, *cache, mask=seen[None, None])
        return self.out(y.reshape(*x.shape[:-1], -1)), cache

    def largest_scores(
        self, x: Float[Array, "B S D"], positions: Int[Array | np.ndarray, "S"]
    ) -> Float[Array, "N"]:
        """Returns the largest attention score of each query head."""
        query, key, _ = self._heads(x, positions)
        return largest_scores(query, key)

    def _heads(self, x: Array, positions: Array | np.ndarray) -> tuple[Array, ...]:
        """Returns queries, keys and values, the first two normalised and rotated."""
        query, key, value = (
            y.reshape(*x.shape[:-1], -1, self.head_size)
            for y in _apply(x, self.query, self.key, self.value)
        )
        turn = lambda y: rotate(y, positions, self.rope_theta, self.rope_scaling)
        return turn(self.query_norm(query)), turn(self.key_norm(key)), value


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

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Returns the output of the layer at each position."""
        gate, up = _apply(x, self.gate, self.up)
        return self.down(jax.nn.silu(gate) * up)


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
        y, cache = self.attention(self.attention_norm(x), positions, cache)
        x = x + y
        return x + self.ffn(self.ffn_norm(x)), cache


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
    return functools.partial(
        nnx.Linear, use_bias=False, dtype=dtype, dot_general=_dot_rows, rngs=rngs
    )


def _apply(x: Array, *linears: nnx.Linear | TernaryLinear) -> list[Array]:
    """Returns the results of linear layers of one input."""
    plain = [linear for linear in linears if isinstance(linear, nnx.Linear)]
    if len(plain) < len(linears):
        return [linear(x) for linear in linears]
    dtype = plain[0].dtype
    kernels = [linear.kernel[...].astype(dtype) for linear in plain]
    return _multiply_rows(x.astype(dtype), kernels)


def _dot_rows(x: Array, kernel: Array, *_: Any, **options: Any) -> Array:
    """Returns `x @ kernel`, computed as one matrix product over all positions."""
    return _multiply_rows(x, [kernel], **options)[0]


def _multiply_rows(x: Array, kernels: list[Array], **options: Any) -> list[Array]:
    rows: Any = _multiply(
        tuple(options.items()), x.reshape(-1, x.shape[-1]), tuple(kernels)
    )
    return [y.reshape(*x.shape[:-1], -1) for y in rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(
    options: tuple, x: Array, kernels: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Returns `x @ kernel` of each, without transposed copies in the gradients.

    Processors multiply in float32. Of bfloat16 kernels they would make all float32
    copies of a block before it starts, and keep them and all gradients to its end: each
    product here waits for its input, and the next for it.
    """
    return tuple(jax.lax.dot(x, _after(y, x), **dict(options)) for y in kernels)


def _multiply_forward(
    options: tuple, x: Array, kernels: tuple[Array, ...]
) -> tuple[tuple[Array, ...], tuple[Array, tuple[Array, ...]]]:
    return _multiply(options, x, kernels), (x, kernels)


def _multiply_backward(
    options: tuple,
    inputs: tuple[Array, tuple[Array, ...]],
    grads: tuple[Array, ...],
) -> tuple[Array, tuple[Array, ...]]:
    x, kernels = inputs
    multiply = lambda x, y, axis: jax.lax.dot_general(
        x, y, (((axis,), (axis,)), ((), ())), **dict(options)
    )
    d_x, d_kernels = jnp.zeros_like(x), []
    for kernel, g in zip(kernels, grads, strict=True):
        d_kernel_of = lambda x, g, y=kernel: multiply(x, g, 0).astype(y.dtype)
        if kernel.dtype != jnp.bfloat16:
            d_x += multiply(g, kernel, 1).astype(x.dtype)
            d_kernels.append(d_kernel_of(x, g))
            continue
        g += after(jnp.int32(0), d_x).astype(g.dtype)
        d_kernel = run_after(d_kernel_of, x, g, result=g)
        d_kernels.append(d_kernel)
        d_x += multiply(g, _after(kernel, d_kernel), 1).astype(x.dtype)
    return d_x, tuple(d_kernels)


def _after(kernel: Array, x: Array) -> Array:
    """Returns a kernel, which if short is there only when `x` is."""
    if kernel.dtype != jnp.bfloat16:
        return kernel
    return kernel + after(jnp.int32(0), x).astype(kernel.dtype)


_multiply.defvjp(_multiply_forward, _multiply_backward)
