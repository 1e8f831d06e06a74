"""Keep the state of any transform quantised between steps."""

import contextvars
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, keystr
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from nanochat_jax.codecs import Codec, Quantized
from nanochat_jax.transforms import placement, trees

SHOWS_STORAGE = contextvars.ContextVar("SHOWS_STORAGE", default=False)
"""Whether `init` says how leaves are stored, by `Stored` nodes, and stores none."""


class QuantizeState(NamedTuple):
    """State of `quantize_state`.

    Attributes:
      count: Steps taken.
      inner: State of the wrapped transform, with `Quantized` nodes for some leaves.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    inner: optax.OptState


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Stored:
    """How a leaf of a state is stored; it stands for the leaf and has no arrays.

    Attributes:
      codec: How its entries become codes.
      shape: Its shape, which codes do not tell if two share a byte.
      dtype: Its type in the state of the wrapped transform.
      name: Its path there, by which stochastic rounding is keyed.
      seed: Seed of that rounding.
    """

    codec: Codec
    shape: tuple[int, ...]
    dtype: Any
    name: str
    seed: int

    def encode(self, x: Float[Array, "..."], count: Int32[Array, ""]) -> Quantized:
        """Returns the leaf in stored form, after `count` steps."""
        # One key must not serve two random draws, here and in the wrapped transform.
        name = f"quantize_state{self.name}"
        keyed = self.codec.needs_key
        key = trees.leaf_key(self.seed, count, name) if keyed else None
        return _encode(self.codec, x, key)

    def stored_shape(self) -> Quantized:
        """Returns shapes and types of the stored form."""
        return _stored_shape(self.codec, self.shape)

    def decode(self, stored: Quantized) -> Float32[Array, "..."]:
        """Returns the leaf that `stored` stands for, in float32."""
        return _decode(self.codec, stored, self.shape[-1])


# Traced once for each codec and shape, not once for each of many leaves.
@functools.partial(jax.jit, static_argnums=0)
def _encode(codec: Codec, x: Array, key: PRNGKeyArray | None) -> Quantized:
    return codec.encode(x, key)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _decode(codec: Codec, stored: Quantized, size: int) -> Array:
    return codec.decode(stored, size)


@functools.cache
def _stored_shape(codec: Codec, shape: tuple[int, ...]) -> Quantized:
    key = jax.random.key(0) if codec.needs_key else None
    return jax.eval_shape(
        lambda x: codec.encode(x, key), jax.ShapeDtypeStruct(shape, jnp.float32)
    )


def is_quantized(node: Any) -> bool:
    """Returns whether a tree node is a `Quantized` array; for `is_leaf` arguments."""
    return isinstance(node, Quantized)


def quantize_state(
    inner: optax.GradientTransformation,
    codecs: Mapping[str, Codec],
    *,
    min_size: int = 4096,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Stores chosen fields of `inner`'s state quantised.

    `inner` is given its state in float32 and never learns of the quantisation. What is
    quantised is settled at `init`; `update` keeps to it. It belongs outermost, around
    `galore`, so that a change of basis happens in float32.

    Example:
      >>> tx = quantize_state(momentum(0.95), {"momentum": Int8(128)})
      >>> state = tx.init({"kernel": jnp.zeros((64, 128)), "bias": jnp.zeros(128)})
      >>> state.inner.momentum["kernel"].codes.dtype.name
      'int8'
      >>> state.inner.momentum["bias"].dtype.name  # under `min_size` entries
      'float32'

    Args:
      inner: Transform whose state to quantise.
      codecs: For names of fields of that state, how their leaves are stored. Leave out
        second moments unless the codec has no code for zero: they are divided by.
      min_size: Leaves with fewer entries are kept as they are, as is what is not
        floating point.
      seed: Seed of stochastic rounding, which is keyed by seed, step and leaf.

    Returns:
      A transformation with the updates of `inner`, whose state is a `QuantizeState`.

    Raises:
      ValueError: At `init`, if `inner` lacks a field named in `codecs`.
    """
    inner = optax.with_extra_args_support(inner)

    def storage(path: KeyPath, x: Any) -> Stored:
        field, _ = trees.split_path(path, codecs) or ("", "")
        return Stored(codecs[field], x.shape, x.dtype, keystr(path), seed)

    def is_chosen(path: KeyPath, x: Array) -> bool:
        return (
            trees.split_path(path, codecs) is not None
            and jnp.issubdtype(x.dtype, jnp.floating)
            and x.ndim > 0
            and x.size >= min_size
        )

    def init_fn(params: optax.Params) -> QuantizeState:
        # Initial states are constants, which XLA would spend minutes folding encoded.
        state = jax.lax.optimization_barrier(inner.init(params))
        if jax.tree.leaves(params):
            _require_fields(state, codecs)
        count, shows = jnp.zeros([], jnp.int32), SHOWS_STORAGE.get()

        def store(path: KeyPath, x: Array) -> Any:
            if not is_chosen(path, x):
                return x
            stored = storage(path, x)
            encode = lambda x: stored.encode(x, count)
            return stored if shows else placement.sharded_as(encode, x)

        return QuantizeState(count, jax.tree.map_with_path(store, state))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, QuantizeState]:
        # Of the parameters, if they are given: projected gradients have other shapes.
        like = jax.eval_shape(inner.init, updates if params is None else params)
        # What another `quantize_state` inside has stored is stored for `inner` too.
        decode = lambda path, x, like: (
            storage(path, like).decode(x)
            if is_quantized(x) and not is_quantized(like)
            else x
        )
        decoded = jax.tree.map_with_path(
            decode, state.inner, like, is_leaf=is_quantized
        )
        new_updates, new_inner = inner.update(updates, decoded, params, **extra_args)
        store = lambda path, old, new: (
            storage(path, new).encode(new, state.count)
            if is_quantized(old) and not is_quantized(new)
            else optax.tree.cast_like(new, old)
        )
        stored = jax.tree.map_with_path(
            store, state.inner, new_inner, is_leaf=is_quantized
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        new_updates = optax.tree.cast_like(new_updates, updates)
        return new_updates, QuantizeState(count, stored)

    return optax.GradientTransformationExtraArgs(
        init_fn, placement.in_auto_mode(update_fn)
    )


def _require_fields(state: optax.OptState, codecs: Mapping[str, Codec]) -> None:
    # Fields with no array count too: `galore` may leave every leaf unprojected.
    absent = lambda node: node is None or isinstance(node, optax.MaskedNode)
    paths = jax.tree.leaves_with_path(state, is_leaf=absent)
    found = set().union(*(trees.field_names(path) for path, _ in paths))
    missing = sorted(set(codecs) - found)
    if missing:
        raise ValueError(
            f"`quantize_state` has codecs for the fields {missing}, which the state of "
            f"`inner` lacks. It has {sorted(found)}: name one of these in `codecs`."
        )
