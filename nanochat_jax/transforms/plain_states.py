"""The state of a quantised transform as plain arrays, and back."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, keystr
from jax.typing import ArrayLike
from jaxtyping import Array, Float32

from nanochat_jax.codecs import Quantized, is_quantized
from nanochat_jax.numerics import hashing
from nanochat_jax.transforms.quantize import QuantizeState


class QuantizationError(NamedTuple):
    """Distance of a stored array from a reference.

    Attributes:
      relative: L2 norm of the difference over that of the reference; 0 for a reference
        of zeros that is stored exactly.
      zeros: Fraction of the entries that are stored as zero and are not in the
        reference.
    """

    relative: Float32[Array, ""]
    zeros: Float32[Array, ""]


def dequantize(state: optax.OptState) -> optax.OptState:
    """Returns a state with every quantised array decoded.

    `QuantizeState` nodes give way to the state inside them. So the result is a state of
    the same transform without its `quantize_state` wrappers, wherever they were.

    Example:
      >>> params = {"kernel": jnp.ones((64, 128))}
      >>> plain = momentum()
      >>> tx = quantize_state(plain, {"momentum": Int8()})
      >>> updates, state = plain.update(params, dequantize(tx.init(params)))

    Args:
      state: A state, as arrays.

    Returns:
      The plain state, with the types that the wrapped transforms gave it.
    """
    decode = lambda x: x.decode().astype(x.dtype)
    return _plain(lambda x: decode(x) if is_quantized(x) else x, state)


def quantize(
    like: optax.OptState, plain: optax.OptState, count: ArrayLike = 0, seed: int = 0
) -> optax.OptState:
    """Returns a plain state stored as another state is; undoes `dequantize`.

    Arrays that `dequantize` gave are stored in the codes they came from, if rounding is
    to nearest. So a state may go from one codec to another, or to none.

    Example:
      >>> params = {"kernel": jnp.ones((64, 128))}
      >>> old = quantize_state(momentum(), {"momentum": Int8()})
      >>> new = quantize_state(momentum(), {"momentum": Int4()})
      >>> like = jax.eval_shape(new.init, params)
      >>> state = quantize(like, dequantize(old.init(params)))

    Args:
      like: State of the transform to make a state of, of arrays or of shapes.
      plain: State of that transform without its `quantize_state` wrappers.
      count: Number of steps taken, which a plain state does not hold.
      seed: Seed of stochastic rounding.

    Returns:
      A state with the structure of `like`.

    Raises:
      ValueError: If `plain` has other paths or shapes.
    """
    arrays = _matching("plain", plain, like)
    count = jnp.asarray(count, jnp.int32)

    def store(above: str, path: KeyPath, x: Any) -> Any:
        name = above + keystr(path)
        if isinstance(x, QuantizeState):
            inside = functools.partial(store, name)
            inner = jax.tree.map_with_path(inside, x.inner, is_leaf=_is_stored)
            return QuantizeState(count, inner)
        return _stored_as(x, arrays[name], count, f"{seed} {name}")

    return jax.tree.map_with_path(
        functools.partial(store, ""), like, is_leaf=_is_stored
    )


def quantization_error(
    state: optax.OptState, plain: optax.OptState
) -> dict[str, QuantizationError]:
    """Measures the distance of the quantised arrays of a state from a plain state.

    Example:
      >>> params = {"kernel": jnp.ones((64, 128))}
      >>> plain, grads = momentum(), {"kernel": jnp.linspace(0, 1, 64 * 128)}
      >>> grads = jax.tree.map(lambda g, p: g.reshape(p.shape), grads, params)
      >>> tx = quantize_state(plain, {"momentum": Int8()})
      >>> _, reference = plain.update(grads, plain.init(params))
      >>> _, state = tx.update(grads, tx.init(params))
      >>> [*quantization_error(state, reference)]
      [".momentum['kernel']"]

    Args:
      state: State with quantised arrays.
      plain: State to compare with, of the same transform without its `quantize_state`
        wrappers.

    Returns:
      By path in the plain state, the error of each quantised array.

    Raises:
      ValueError: If `plain` has other paths or shapes.
    """
    references = _matching("plain", plain, state)
    nodes = jax.tree.leaves_with_path(_plain(lambda x: x, state), is_leaf=is_quantized)
    return {
        keystr(path): _error(node.decode(), references[keystr(path)])
        for path, node in nodes
        if is_quantized(node)
    }


def _error(x: Array, reference: Array) -> QuantizationError:
    reference = reference.astype(jnp.float32)
    size = jnp.linalg.norm(reference.ravel())
    difference = jnp.linalg.norm((x - reference).ravel())
    exact = difference == 0
    relative = jnp.where(exact, 0.0, difference / jnp.where(exact, 1.0, size))
    return QuantizationError(relative, jnp.mean((x == 0) & (reference != 0)))


def _stored_as(like: Any, x: Array, count: Array, name: str) -> Any:
    x = jnp.asarray(x).astype(like.dtype)
    if not is_quantized(like):
        return x
    key = hashing.leaf_key(0, count, name) if like.codec.needs_key else None
    return like.codec.encode(x, key)


def _is_stored(node: Any) -> bool:
    return isinstance(node, QuantizeState | Quantized)


def _plain(f: Callable[[Any], Any], state: Any) -> Any:
    """Maps leaves of a state, with `QuantizeState` nodes replaced by their insides."""
    visit = lambda node: (
        _plain(f, node.inner) if isinstance(node, QuantizeState) else f(node)
    )
    return jax.tree.map(visit, state, is_leaf=_is_stored)


def _matching(name: str, plain: Any, state: Any) -> dict[str, Any]:
    """Returns the arrays of a plain state by path, if they are those of a state."""
    got = {keystr(path): x for path, x in jax.tree.leaves_with_path(plain)}
    nodes = jax.tree.leaves_with_path(_plain(lambda x: x, state), is_leaf=is_quantized)
    wanted = {keystr(path): x.shape for path, x in nodes}
    if got.keys() != wanted.keys():
        raise ValueError(
            f"`{name}` is not the plain form of that state. It lacks "
            f"{sorted(wanted.keys() - got.keys())} and has besides "
            f"{sorted(got.keys() - wanted.keys())}."
        )
    shapes = {path: jnp.shape(x) for path, x in got.items()}
    wrong = [
        f"  {path} has shape {shapes[path]}, where the state has {shape}"
        for path, shape in wanted.items()
        if shapes[path] != shape
    ]
    if wrong:
        raise ValueError(
            f"`{name}` is not the plain form of that state:\n" + "\n".join(wrong)
        )
    return got
