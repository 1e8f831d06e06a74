"""How a leaf of a state is stored, in the terms of the codec that stores it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from nanochat_jax.codecs import Codec, Quantized
from nanochat_jax.numerics import hashing


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
        key = hashing.leaf_key(self.seed, count, name) if keyed else None
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


def require_stored(
    found: Mapping[str, Quantized], wanted: Mapping[str, Stored | None]
) -> None:
    """Refuses leaves that another codec or another size of blocks has stored.

    Shapes and types of codes and scales tell codecs apart, and blocks by their number
    in a row. They do not tell two tables of one size, such as `Dynamic8` with and
    without a sign, or two sizes of blocks of which a row has equally many.

    Args:
      found: Stored leaves of a state, by path.
      wanted: How each should be stored, `None` for not at all.

    Raises:
      ValueError: If one is stored in another way; with all that are.
    """
    wrong = []
    for name, leaf in found.items():
        storage = wanted.get(name)
        got = _described(*leaf)
        if storage is None:
            wrong.append(f"  {name} is stored as {got}, and no codec is given for it")
        elif got != (expected := _described(*storage.stored_shape())):
            wrong.append(
                f"  {name} is stored as {got}, where {storage.codec} has {expected}"
            )
    if wrong:
        raise ValueError(
            "the state was stored by another codec, or in blocks of another size:\n"
            + "\n".join(wrong)
            + "\nGive the transform that made it, or convert the state with "
            "`quantize(new, dequantize(old, state, params), params)`."
        )


def _described(codes: Any, scales: Any) -> str:
    arrays = (f"{x.dtype.name}{list(x.shape)}" for x in (codes, scales))
    return "codes {} with scales {}".format(*arrays)
