"""Rows of an embedding, with gradients added up in float32."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanochat_jax.transforms import after

_PIECE_BYTES = 1 << 26
"""Float32 bytes of rows whose gradients are added up at a time."""


def take_rows(
    table: Float[Array, "V D"], tokens: Int[Array, "B S"]
) -> Float[Array, "B S D"]:
    """Returns the rows of tokens; NaN for tokens that are not in the table.

    Gradients of a frequent token are thousands of summands, of which a sum in bfloat16
    would lose the last ones.

    Args:
      table: The embedding.
      tokens: Indices of rows.
    """
    if table.dtype.itemsize >= 4:
        return jnp.take(table, tokens, axis=0)
    return _take(table.shape, table.dtype.name, table, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _take(shape: tuple[int, ...], dtype: str, table: Array, tokens: Array) -> Array:
    del shape, dtype
    return jnp.take(table, tokens, axis=0)


def _forward(
    shape: tuple[int, ...], dtype: str, table: Array, tokens: Array
) -> tuple[Array, Array]:
    return _take(shape, dtype, table, tokens), tokens


def _backward(
    shape: tuple[int, ...], dtype: str, tokens: Array, g: Array
) -> tuple[Array, None]:
    rows = max(1, min(shape[0], _PIECE_BYTES // (4 * shape[1])))
    # Known only when `g` is, so that no table of zeros is laid out long before.
    zero = after(jnp.zeros([], jnp.int32), g).astype(dtype)

    def add(start: Array | int, count: int, total: Array) -> Array:
        piece = jnp.full((count, shape[1]), zero, jnp.float32)
        piece = piece.at[_within(tokens - start, count)].add(
            g.astype(jnp.float32), mode="drop"
        )
        return jax.lax.dynamic_update_slice_in_dim(total, piece.astype(dtype), start, 0)

    pieces, rest = divmod(shape[0], rows)
    total = jax.lax.fori_loop(
        0,
        pieces,
        lambda i, total: add(i * rows, rows, total),
        jnp.full(shape, zero),
    )
    return (add(pieces * rows, rest, total) if rest else total), None


def _within(index: Array, size: int) -> Array:
    """Returns indices, those below zero moved beyond the end."""
    return jnp.where(index < 0, size, index)


_take.defvjp(_forward, _backward)
