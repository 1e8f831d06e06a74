"""Keep the state of any transform quantised between steps."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, keystr
from jaxtyping import Array, Int32

from nanochat_jax.codecs import Codec, Quantized
from nanochat_jax.transforms import trees


class QuantizeState(NamedTuple):
    """State of `quantize_state`.

    Attributes:
      count: Steps taken.
      inner: State of the wrapped transform, with `Quantized` nodes for some leaves.
    """

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    inner: optax.OptState


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

    def encode(path: KeyPath, x: Array, count: Array) -> Quantized:
        codec = codecs[_field(path, codecs)]
        # One key must not serve two random draws, here and inside `inner`.
        name = f"quantize_state{keystr(path)}"
        key = trees.leaf_key(seed, count, name) if codec.needs_key else None
        return codec.encode(x, key)

    def decode(path: KeyPath, x: Any, like: Any) -> Any:
        if not is_quantized(x):
            return x
        return codecs[_field(path, codecs)].decode(x, like.shape[-1])

    def init_fn(params: optax.Params) -> QuantizeState:
        # Initial states are constants, which XLA would spend minutes folding encoded.
        state = jax.lax.optimization_barrier(inner.init(params))
        if jax.tree.leaves(params):
            _require_fields(state, codecs)
        count = jnp.zeros([], jnp.int32)
        chosen = lambda path, x: (
            trees.split_path(path, codecs) is not None
            and jnp.issubdtype(x.dtype, jnp.floating)
            and x.ndim > 0
            and x.size >= min_size
        )
        return QuantizeState(
            count,
            jax.tree.map_with_path(
                lambda path, x: encode(path, x, count) if chosen(path, x) else x, state
            ),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, QuantizeState]:
        # Two codes may share a byte: the shape of a leaf is that which `inner` gave it.
        like = jax.eval_shape(inner.init, updates)
        decoded = jax.tree.map_with_path(
            decode, state.inner, like, is_leaf=is_quantized
        )
        new_updates, new_inner = inner.update(updates, decoded, params, **extra_args)
        store = lambda path, old, new: (
            encode(path, new, state.count)
            if is_quantized(old)
            else new.astype(old.dtype)
        )
        stored = jax.tree.map_with_path(
            store, state.inner, new_inner, is_leaf=is_quantized
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        new_updates = optax.tree.cast_like(new_updates, updates)
        return new_updates, QuantizeState(count, stored)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _field(path: KeyPath, codecs: Mapping[str, Codec]) -> str:
    found = trees.split_path(path, codecs)
    assert found is not None, keystr(path)  # `init` chose the leaf by this field
    return found[0]


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
