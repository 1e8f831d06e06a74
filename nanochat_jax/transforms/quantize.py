"""Keep the state of any transform quantised between steps."""

import contextvars
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, keystr
from jaxtyping import Array, Int32

from nanochat_jax.codecs import Codec, Quantized
from nanochat_jax.transforms import checks, precision
from nanochat_jax.transforms.sharding import placement
from nanochat_jax.transforms.state_paths import locate
from nanochat_jax.transforms.stored import (
    Stored,
    is_quantized as is_quantized,
    require_stored,
)

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
      TypeError: At `init`, if a parameter is complex.
      ValueError: At `init`, if `inner` lacks a field named in `codecs`; at `update`, if
        shapes or types of the state are those of another codec or size of blocks. Two
        tables of 256 levels, such as `Dynamic8` and `MuLaw8`, look alike.
    """
    inner = optax.with_extra_args_support(inner)

    def storage(state: Any, params: optax.Params) -> dict[str, Stored]:
        """Returns by path how the leaves of the chosen fields are stored."""
        found, places = {}, locate(state, params)
        for path, x in jax.tree.leaves_with_path(state, is_leaf=is_quantized):
            name = keystr(path)
            field = places[name].field(codecs)
            # What another `quantize_state` inside has stored is stored for `inner` too.
            if field is None or is_quantized(x):
                continue
            if jnp.issubdtype(x.dtype, jnp.floating) and x.ndim > 0:
                found[name] = Stored(codecs[field], x.shape, x.dtype, name, seed)
        return found

    def init_fn(params: optax.Params) -> QuantizeState:
        checks.require_real(params, "quantize_state")
        # Initial states are constants, which XLA would spend minutes folding encoded.
        state = jax.lax.optimization_barrier(inner.init(params))
        if jax.tree.leaves(params):
            _require_fields(state, params, codecs)
        count, shows = jnp.zeros([], jnp.int32), _shows_storage()
        stored = storage(state, params)

        def store(path: KeyPath, x: Any) -> Any:
            how = stored.get(keystr(path))
            if how is None or x.size < max(min_size, 1):
                return x
            encode = lambda x: how.encode(x, count)
            return how if shows else placement.sharded_as(encode, x)

        state = jax.tree.map_with_path(store, state, is_leaf=is_quantized)
        return QuantizeState(count, state)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, QuantizeState]:
        checks.require_state(state, QuantizeState, "quantize_state")
        # Of the parameters, if they are given: projected gradients have other shapes.
        whole = updates if params is None else params
        like = jax.eval_shape(inner.init, whole)
        stored = _chosen(state.inner, like, storage(like, whole))
        decode = lambda path, x: (
            stored[keystr(path)].decode(x) if keystr(path) in stored else x
        )
        decoded = jax.tree.map_with_path(decode, state.inner, is_leaf=is_quantized)
        new_updates, new_inner = inner.update(
            precision.widened(updates), decoded, params, **extra_args
        )
        encode = lambda path, old, new: (
            stored[keystr(path)].encode(new, state.count)
            if keystr(path) in stored
            else optax.tree.cast_like(new, old)
        )
        new_inner = jax.tree.map_with_path(
            encode, state.inner, new_inner, is_leaf=is_quantized
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        new_updates = precision.cast_like(new_updates, updates)
        return new_updates, QuantizeState(count, new_inner)

    return optax.GradientTransformationExtraArgs(
        init_fn, placement.in_auto_mode(update_fn)
    )


def _shows_storage() -> bool:
    # Not in `init`, with which the variable would be pickled, which it cannot be.
    return SHOWS_STORAGE.get()


def _chosen(
    state: optax.OptState, like: optax.OptState, storage: Mapping[str, Stored]
) -> dict[str, Stored]:
    """Returns how the leaves are stored that are, by path, after a check of each.

    Args:
      state: State with stored leaves.
      like: Shapes of the state of the wrapped transform.
      storage: How leaves may be stored.
    """
    found, inside = _quantized_leaves(state), _quantized_leaves(like)
    found = {name: node for name, node in found.items() if name not in inside}
    require_stored(found, storage)
    return {name: storage[name] for name in found}


def _quantized_leaves(state: optax.OptState) -> dict[str, Quantized]:
    nodes = jax.tree.leaves_with_path(state, is_leaf=is_quantized)
    return {keystr(path): node for path, node in nodes if is_quantized(node)}


def _require_fields(
    state: optax.OptState, params: optax.Params, codecs: Mapping[str, Codec]
) -> None:
    # Fields with no array count too: `galore` may leave every leaf unprojected.
    places = locate(state, params).values()
    found = {field for place in places for field in place.fields}
    missing = sorted(set(codecs) - found)
    if missing:
        raise ValueError(
            f"`quantize_state` has codecs for the fields {missing}, which the state of "
            f"`inner` lacks. It has {sorted(found)}: name one of these in `codecs`."
        )
