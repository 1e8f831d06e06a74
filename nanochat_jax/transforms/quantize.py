"""Keep the state of any transform quantised between steps."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, keystr
from jax.typing import ArrayLike
from jaxtyping import Array, Int32

from nanochat_jax.codecs import Codec, Quantized, is_quantized
from nanochat_jax.numerics import hashing
from nanochat_jax.transforms import checks, precision, record
from nanochat_jax.transforms.scheduling import group_bytes, rows_at_a_time
from nanochat_jax.transforms.sharding import Entries, in_auto_mode, layout, sharded_as
from nanochat_jax.transforms.state_paths import Place, locate


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

    `inner` is given its state in float32 and never learns of the quantisation. The
    leaves to quantise are chosen at `init`, and say so themselves from then on. It
    belongs outermost, around `galore`, so that a change of basis happens in float32.

    Example:
      >>> tx = quantize_state(momentum(0.95), {"momentum": Int8(128)})
      >>> state = tx.init({"kernel": jnp.zeros((64, 128)), "bias": jnp.zeros(128)})
      >>> state.inner.momentum["kernel"].codes.dtype.name
      'int8'
      >>> state.inner.momentum["bias"].dtype.name  # under `min_size` entries
      'float32'

    Args:
      inner: Transform whose state to quantise.
      codecs: Codec by name of a field of that state. Leave out second moments unless
        the codec has no code for zero: they are divided by.
      min_size: Leaves with fewer entries are kept as they are, as is what is not
        floating point.
      seed: Seed of stochastic rounding, which is keyed by seed, step and leaf.

    Returns:
      A transformation with the updates of `inner`, whose state is a `QuantizeState`.

    Raises:
      TypeError: If `codecs` holds anything but codecs; at `init`, if a parameter is
        complex.
      ValueError: At `init`, if `inner` lacks a field named in `codecs`; at `update`, if
        a leaf of the state was stored by another codec.
    """
    checks.require_codecs(codecs)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> QuantizeState:
        checks.require_real(params, "quantize_state")
        state = inner.init(params)
        places = locate(state, params)
        if jax.tree.leaves(params):
            _require_fields(places, codecs)
        keys = _Keys(seed, jnp.zeros([], jnp.int32), places)

        def store(path: KeyPath, x: Any) -> Any:
            name = keystr(path)
            field = places[name].field(codecs)
            # A leaf that another `quantize_state` inside has stored is left to it.
            if field is None or is_quantized(x):
                return x
            size = layout().size_of(places[name].name, x)
            if not _is_real(x) or size < max(min_size, 1):
                return x
            return sharded_as(_initial(keys, codecs[field], name), x)

        return QuantizeState(keys.count, _over_leaves(store, state))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        layer: ArrayLike = 0,
        entries: Mapping[str, Entries] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, QuantizeState]:
        checks.require_state(state, QuantizeState, "quantize_state")
        fields = _stored_here(state.inner, updates, codecs)
        decode = lambda path, x: x.decode() if keystr(path) in fields else x
        plain, wide = _over_leaves(decode, state.inner), precision.widened(updates)
        extra_args |= {"layer": layer, "entries": entries}
        new_updates, new_inner = inner.update(wide, plain, params, **extra_args)
        places = locate(state.inner, updates)
        keys = _Keys(seed, state.count, places, layer, entries or {})

        def store(path: KeyPath, old: Any, new: Any) -> Any:
            name = keystr(path)
            if name not in fields:
                return optax.tree.cast_like(new, old)
            stored = keys.encode(codecs[fields[name]], name, new)
            return dataclasses.replace(stored, dtype=old.dtype)

        count = jnp.asarray(optax.safe_increment(state.count))
        new_state = QuantizeState(count, _over_leaves(store, state.inner, new_inner))
        return precision.cast_like(new_updates, updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, in_auto_mode(update_fn))


_over_leaves = functools.partial(jax.tree.map_with_path, is_leaf=is_quantized)


class _Keys(NamedTuple):
    """What random keys of stored leaves follow from, besides their paths.

    Attributes:
      seed: Seed of the rounding.
      count: Number of the step.
      places: Places of the leaves in the state.
      layer: Index on the first axis of their first entries.
      entries: Entries of stacks, by path, where matrices have owners.
    """

    seed: int
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    places: Mapping[str, Place]
    layer: ArrayLike = 0
    entries: Mapping[str, Entries] = MappingProxyType({})

    def encode(self, codec: Codec, name: str, x: Array) -> Quantized:
        """Returns a leaf, or some of its entries, in stored form."""
        if not codec.needs_key:
            return _encode(codec, x, None)
        above, leaf = self.places[name]
        entries = self.entries.get(leaf or "")
        # One key must not serve two random draws, here and in the wrapped transform.
        prefix = f"quantize_state{keystr(above)}"
        if entries is not None:
            keys = entries.keys(self.seed, self.count, prefix, self.layer, x.shape)
            return jax.vmap(functools.partial(_encode, codec))(x, keys)
        start = hashing.start_of(self.layer, x.shape)
        key = hashing.leaf_key(self.seed, self.count, f"{prefix}{leaf or ''}", start)
        return _encode(codec, x, key)


def _initial(keys: _Keys, codec: Codec, name: str) -> Callable[[Array], Quantized]:
    """Returns the function that stores a leaf of the initial state."""
    if record.is_recording():  # who listens wants shapes, not codes
        return functools.partial(_empty, codec)
    return _by_rows(lambda x, i: keys._replace(layer=i).encode(codec, name, x))


def _by_rows(encode: Callable[[Array, ArrayLike], Quantized]) -> Callable[..., Any]:
    """Returns a function that encodes an initial leaf, a large one by its first axis.

    So a large leaf, which is constant, never exists in float32.
    """

    def encode_leaf(x: Array) -> Quantized:
        most = rows_at_a_time(x, group_bytes()) if x.ndim > 1 else len(x)
        rows = math.gcd(len(x), most)

        def encode_part(start: ArrayLike) -> Quantized:
            part = jax.lax.dynamic_slice_in_dim(x, start, rows)
            # XLA would spend minutes folding the codes of a constant.
            return encode(jax.lax.optimization_barrier(part), start)

        if rows == len(x):
            return encode_part(0)
        parts = jax.lax.map(encode_part, jnp.arange(0, len(x), rows))
        return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), parts)

    return encode_leaf


def _empty(codec: Codec, x: Array) -> Quantized:
    """Returns a stored leaf that is empty; shapes are found once for all like it."""
    like = lambda y: jnp.zeros(y.shape, y.dtype)
    return jax.tree.map(like, _stored_shapes(codec, x.shape, x.dtype))


@functools.lru_cache
def _stored_shapes(codec: Codec, shape: tuple[int, ...], dtype: Any) -> Quantized:
    x, key = jax.ShapeDtypeStruct(shape, dtype), jax.eval_shape(jax.random.key, 0)
    return jax.eval_shape(codec.encode, x, key if codec.needs_key else None)


def _is_real(x: Array) -> bool:
    return x.ndim > 0 and jnp.issubdtype(x.dtype, jnp.floating)


# Traced once for each codec and shape, not once for each of many leaves.
_encode = jax.jit(lambda codec, x, key: codec.encode(x, key), static_argnums=0)


def _stored_here(
    state: optax.OptState, updates: optax.Updates, codecs: Mapping[str, Codec]
) -> dict[str, str]:
    """Returns the fields of the leaves that this wrapper has stored, by path.

    A leaf inside another `quantize_state` may be that one's; if the codec is the same,
    it does not matter whose it is.
    """
    places = locate(state, updates)
    is_wrapper = lambda node: isinstance(node, QuantizeState)
    wrappers = [
        path
        for path, node in jax.tree.leaves_with_path(state, is_leaf=is_wrapper)
        if is_wrapper(node)
    ]
    fields, wrong = {}, []
    for path, leaf in jax.tree.leaves_with_path(state, is_leaf=is_quantized):
        if not is_quantized(leaf):
            continue
        name = keystr(path)
        field = places[name].field(codecs)
        if field is not None and leaf.codec == codecs[field]:
            fields[name] = field
        elif not any(path[: len(wrapper)] == wrapper for wrapper in wrappers):
            given = (
                "no codec is given" if field is None else f"{codecs[field]} is given"
            )
            wrong.append(f"  {name} is stored by {leaf.codec}, where {given}")
    if wrong:
        raise ValueError(
            "the state was stored by other codecs than those of `quantize_state`:\n"
            + "\n".join(wrong)
            + "\nGive the codecs that it was stored by, or convert it: "
            "`quantize(jax.eval_shape(tx.init, params), dequantize(state))`."
        )
    return fields


def _require_fields(places: Mapping[str, Place], codecs: Mapping[str, Codec]) -> None:
    # Fields with no array count too: `galore` may leave every leaf unprojected.
    found = {field for place in places.values() for field in place.fields}
    missing = sorted(set(codecs) - found)
    if missing:
        raise ValueError(
            f"`quantize_state` has codecs for the fields {missing}, which the state of "
            f"`inner` lacks. It has {sorted(found)}: name one of these in `codecs`."
        )
