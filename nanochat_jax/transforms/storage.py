"""The state of a quantised transform as plain arrays, and back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr
from jax.typing import ArrayLike
from jaxtyping import Array, Float32

from nanochat_jax.transforms.quantize import SHOWS_STORAGE, QuantizeState
from nanochat_jax.transforms.record import abstract_init
from nanochat_jax.transforms.stored import Stored, is_quantized, require_stored


class QuantizationError(NamedTuple):
    """How far a stored array is from what it should be.

    Attributes:
      relative: L2 norm of the difference over that of the reference; 0 for a reference
        of zeros that is stored exactly.
      zeros: Share of the entries that are zero as stored, and not in the reference.
    """

    relative: Float32[Array, ""]
    zeros: Float32[Array, ""]


def dequantize(
    tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params
) -> optax.OptState:
    """Returns a state with every quantised array decoded.

    `QuantizeState` nodes give way to the state inside them, so the result is a state of
    the transform that `tx` would be without its `quantize_state` wrappers, wherever in
    it they are: it equals that one's own state but for the error of the codecs.

    Example:
      >>> params = {"kernel": jnp.ones((64, 128))}
      >>> plain = momentum()
      >>> tx = quantize_state(plain, {"momentum": Int8()})
      >>> state = dequantize(tx, tx.init(params), params)
      >>> updates, state = plain.update(params, state)

    Args:
      tx: Transformation that the state is of.
      state: Its state, as arrays.
      params: Parameters it was made for, as arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      The plain state, with the types that the wrapped transforms gave it.

    Raises:
      ValueError: If `state` has not the structure of `tx.init(params)`, or was stored
        by other codecs, as far as arrays tell.
    """

    storage = storage_of(tx, params)
    _require_paths("state", state, abstract_init(tx, params))
    _require_codecs(state, storage)
    decode = lambda node, x: (
        node.decode(x).astype(node.dtype) if isinstance(node, Stored) else x
    )
    return _map(decode, _unwrap(storage), _unwrap(state))


def quantize(
    tx: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    count: ArrayLike = 0,
) -> optax.OptState:
    """Returns the state of `tx` in which a plain state is stored; undoes `dequantize`.

    What `dequantize` gave is stored in the codes it came from, if `tx` rounds to
    nearest. So a state may go from one codec to another, or to none.

    Example:
      >>> params = {"kernel": jnp.ones((64, 128))}
      >>> old = quantize_state(momentum(), {"momentum": Int8()})
      >>> new = quantize_state(momentum(), {"momentum": Int4()})
      >>> plain = dequantize(old, old.init(params), params)
      >>> state = quantize(new, plain, params)

    Args:
      tx: Transformation to make a state of.
      state: State of the transform that `tx` would be without its `quantize_state`
        wrappers.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.
      count: Steps taken, which key stochastic rounding and are not in a plain state.

    Returns:
      A state of `tx`.

    Raises:
      ValueError: If `state` has another structure.
    """
    storage = storage_of(tx, params)
    _require_paths("state", state, _empty(storage))
    count = jnp.asarray(count, jnp.int32)

    def store(node: Any, x: Any) -> Any:
        if isinstance(node, QuantizeState):
            return QuantizeState(count, _map(store, node.inner, x))
        return node.encode(x, count) if isinstance(node, Stored) else x

    return _map(store, storage, state)


def quantization_error(
    tx: optax.GradientTransformation,
    state: optax.OptState,
    reference: optax.OptState,
    params: optax.Params,
) -> dict[str, QuantizationError]:
    """Measures how far the quantised arrays of a state are from a plain state.

    Example:
      >>> params = {"kernel": jnp.ones((64, 128))}
      >>> plain, grads = momentum(), {"kernel": jnp.linspace(0, 1, 64 * 128)}
      >>> grads = jax.tree.map(lambda g, p: g.reshape(p.shape), grads, params)
      >>> tx = quantize_state(plain, {"momentum": Int8()})
      >>> _, reference = plain.update(grads, plain.init(params))
      >>> _, state = tx.update(grads, tx.init(params))
      >>> [*quantization_error(tx, state, reference, params)]
      [".momentum['kernel']"]

    Args:
      tx: Transformation that the state is of.
      state: Its state.
      reference: State to compare with, of the transform that `tx` would be without its
        `quantize_state` wrappers.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      By path in the plain state, the error of each quantised array.

    Raises:
      ValueError: If `state` or `reference` has not the structure it should have.
    """
    storage = storage_of(tx, params)
    _require_paths("reference", reference, _empty(storage))
    decoded = dequantize(tx, state, params)
    errors = _map(
        lambda node, x, y: _error(x, y) if isinstance(node, Stored) else None,
        _unwrap(storage),
        decoded,
        reference,
    )
    is_error = lambda node: isinstance(node, QuantizationError)
    return {
        keystr(path): error
        for path, error in jax.tree.leaves_with_path(errors, is_leaf=is_error)
    }


def _error(x: Array, reference: Array) -> QuantizationError:
    x, reference = x.astype(jnp.float32), reference.astype(jnp.float32)
    size = jnp.linalg.norm(reference.ravel())
    difference = jnp.linalg.norm((x - reference).ravel())
    exact = difference == 0
    relative = jnp.where(exact, 0.0, difference / jnp.where(exact, 1.0, size))
    return QuantizationError(relative, jnp.mean((x == 0) & (reference != 0)))


def storage_of(tx: optax.GradientTransformation, params: optax.Params) -> Any:
    """Returns `tx.init(params)` with `Stored` nodes in place of quantised arrays."""
    token = SHOWS_STORAGE.set(True)
    try:
        # An `init` that was compiled before would give the state it gave then.
        with jax.disable_jit():
            return abstract_init(tx, params)
    finally:
        SHOWS_STORAGE.reset(token)


def _unwrap(state: Any) -> Any:
    """Returns a state with what is in its `QuantizeState` nodes in their place."""
    is_wrapper = lambda node: isinstance(node, QuantizeState)
    return jax.tree.map(
        lambda node: _unwrap(node.inner) if is_wrapper(node) else node,
        state,
        is_leaf=lambda node: is_wrapper(node) or isinstance(node, Stored),
    )


def _empty(storage: Any) -> Any:
    """Returns a tree like the plain state of a storage tree."""
    is_stored = lambda node: isinstance(node, Stored)
    return jax.tree.map(lambda node: 0, _unwrap(storage), is_leaf=is_stored)


def _map(f: Callable[..., Any], storage: Any, *states: Any) -> Any:
    """Maps `f` over the nodes of a storage tree and what states have in their place."""
    is_node = lambda node: isinstance(node, QuantizeState | Stored)
    return jax.tree.map(f, storage, *states, is_leaf=is_node)


def _require_paths(name: str, state: Any, wanted: Any) -> None:
    paths = lambda tree: {keystr(path) for path, _ in jax.tree.leaves_with_path(tree)}
    got, wanted = paths(state), paths(wanted)
    if got != wanted:
        raise ValueError(
            f"`{name}` is not the state that `tx` has for these parameters. It lacks "
            f"{sorted(wanted - got)} and has besides {sorted(got - wanted)}."
        )


def _require_codecs(state: Any, storage: Any) -> None:
    is_stored = lambda node: isinstance(node, Stored)
    wanted = jax.tree.leaves_with_path(storage, is_leaf=is_stored)
    found = jax.tree.leaves_with_path(state, is_leaf=is_quantized)
    require_stored(
        {keystr(path): node for path, node in found if is_quantized(node)},
        {keystr(path): node for path, node in wanted if is_stored(node)},
    )
