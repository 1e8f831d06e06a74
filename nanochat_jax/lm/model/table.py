"""The table of a vocabulary: rows are looked up in it, and logits read out by it.

A table in a short type, and its gradient, are worked on in pieces of the vocabulary,
since products and sums of either would need it in float32.

Axes: B batch, S sequence, D features, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from nanochat_jax.lm.model import activation_sharding
from nanochat_jax.transforms import (
    after,
    from_bits,
    group_bytes,
    in_pieces,
    rows_at_a_time,
    to_bits,
)


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


class ReadOut(NamedTuple):
    """Logits of features, and their loss, by a table.

    Attributes:
      axis: Axis of the vocabulary in the table.
      vocab_size: Entries that are tokens; the others are padding.
    """

    axis: int
    vocab_size: int

    def logits(
        self, table: Float[Array, "..."], x: Float[Array, "*batch D"]
    ) -> Float32[Array, "*batch V"]:
        """Returns the products of features with each entry; of padding `-inf`.

        Args:
          table: The table, `[V, D]` or `[D, V]`.
          x: Features; products are computed in their type.
        """
        if self._is_whole(table):
            table = table.astype(x.dtype)
            return self._masked(_dot(x, table, self.axis).astype(jnp.float32), 0)
        return self._logits_in_pieces(table, x)

    def loss(
        self,
        table: Float[Array, "..."],
        x: Float[Array, "*batch D"],
        labels: Int[Array, "*batch"],
    ) -> Float32[Array, ""]:
        """Returns the summed cross-entropy of labels, in nats.

        Args:
          table: As for `logits`.
          x: As for `logits`.
          labels: Token ids; those below zero are not predicted.
        """
        if self._is_whole(table):
            return summed_cross_entropy(self.logits(table, x), labels)
        return _loss_in_pieces(self, table, x, labels)

    def _is_whole(self, table: Array) -> bool:
        # On a mesh too, or devices would add up the gradients of each piece.
        is_long = table.dtype.itemsize >= 4 or activation_sharding.is_used()
        return is_long or self._rows(table) == table.shape[self.axis]

    def _rows(self, table: Array) -> int:
        """Returns the number of entries that are worked on at a time."""
        return rows_at_a_time(table, group_bytes(), self.axis)

    def _masked(self, logits: Array, start: Array | int) -> Array:
        count = logits.shape[-1]
        if isinstance(start, int) and start + count <= self.vocab_size:
            return logits
        # Masked, since slicing would move the logits between devices.
        known = start + jnp.arange(count) < self.vocab_size
        return jnp.where(known[(None,) * (logits.ndim - 1)], logits, -jnp.inf)

    def _logits_in_pieces(self, table: Array, x: Array) -> Array:
        def write(start: Array | int, piece: Array, logits: Array) -> Array:
            part = _dot(x, piece.astype(x.dtype), self.axis).astype(jnp.float32)
            return lax.dynamic_update_slice_in_dim(
                logits, self._masked(part, start), start, -1
            )

        shape = (*x.shape[:-1], table.shape[self.axis])
        return self.over(write, table, jnp.zeros(shape, jnp.float32))

    def over(
        self, work: Callable[[Array | int, Array, Any], Any], table: Array, done: Any
    ) -> Any:
        """Returns `done` after `work(start, piece, done)` for each piece of a table.

        Args:
          work: Function of the first entry of a piece, the piece, and `done`.
          table: The table.
          done: What is passed from one piece to the next.
        """

        def go_on(start: Array | int, count: int, carry: Any) -> Any:
            table, done = carry
            # Carried on behind a barrier, or all of it would be converted beforehand.
            table = lax.optimization_barrier(table)
            piece = lax.dynamic_slice_in_dim(table, start, count, self.axis)
            return table, work(start, piece, done)

        size = table.shape[self.axis]
        return in_pieces(go_on, size, self._rows(table), (table, done))[1]


@jax.custom_vjp
def summed_cross_entropy(
    logits: Float32[Array, "*batch V"], labels: Int[Array, "*batch"]
) -> Float32[Array, ""]:
    """Returns the summed cross-entropy of labels, in nats.

    The backward pass needs the logits alone, of all that is as large. It has no
    forward-mode derivative.

    Args:
      logits: Logits.
      labels: Index of the correct logit; those below zero are left out, those beyond
        the vocabulary give NaN.
    """
    return _sum(logits, labels)[0]


def _sum(logits: Array, labels: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    """Returns the sum, and logits, logarithms of their sums, and labels."""
    # Not gathered, which a mesh that divides the vocabulary could not do in place.
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    chosen = jnp.sum(logits, axis=-1, where=is_label)
    sums = jax.nn.logsumexp(logits, axis=-1)
    losses = sums - jnp.where(labels < logits.shape[-1], chosen, jnp.nan)
    return jnp.sum(jnp.where(labels < 0, 0, losses)), (logits, sums, labels)


def _d_sum(kept: tuple[Array, Array, Array], g: Array) -> tuple[Array, None]:
    logits, sums, labels = kept
    return _d_logits(logits, sums, labels) * jnp.where(labels < 0, 0, g)[
        ..., None
    ], None


def _d_logits(logits: Array, sums: Array, labels: Array) -> Array:
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return jnp.exp(logits - sums[..., None]) - is_label


summed_cross_entropy.defvjp(_sum, _d_sum)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_in_pieces(by: ReadOut, table: Array, x: Array, labels: Array) -> Array:
    return summed_cross_entropy(by.logits(table, x), labels)


def _loss_forward(
    by: ReadOut, table: Array, x: Array, labels: Array
) -> tuple[Array, Any]:
    loss, kept = _sum(by.logits(table, x), labels)
    return loss, (table, x, kept)


def _loss_backward(by: ReadOut, kept: Any, g: Array) -> tuple[Array, Array, None]:
    """Returns the gradients, with those of the logits made one piece at a time."""
    table, x, (logits, sums, labels) = kept
    batch = tuple(range(x.ndim - 1))
    scale = jnp.where(labels < 0, 0, g)[..., None]

    def add(start: Array | int, piece: Array, carry: Any) -> Any:
        d_bits, d_x = carry
        part = lax.dynamic_slice_in_dim(logits, start, piece.shape[by.axis], -1)
        d_logits = (_d_logits(part, sums, labels - start) * scale).astype(x.dtype)
        d_x += _dot(d_logits, piece.astype(x.dtype), 1 - by.axis).astype(d_x.dtype)
        factors = (d_logits, x) if by.axis == 0 else (x, d_logits)
        d_piece = lax.dot_general(*factors, ((batch, batch), ((), ())))
        d_piece = to_bits(d_piece.astype(table.dtype))
        return lax.dynamic_update_slice_in_dim(d_bits, d_piece, start, by.axis), d_x

    d_bits = to_bits(_zeros_after(sums, table.shape, table.dtype))
    d_x = _zeros_after(sums, x.shape, jnp.float32)
    d_bits, d_x = by.over(add, table, (d_bits, d_x))
    return from_bits(d_bits, table.dtype), d_x.astype(x.dtype), None


_loss_in_pieces.defvjp(_loss_forward, _loss_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _take(shape: tuple[int, ...], dtype: str, table: Array, tokens: Array) -> Array:
    del shape, dtype
    return jnp.take(table, tokens, axis=0)


def _take_forward(
    shape: tuple[int, ...], dtype: str, table: Array, tokens: Array
) -> tuple[Array, Array]:
    return _take(shape, dtype, table, tokens), tokens


def _take_backward(
    shape: tuple[int, ...], dtype: str, tokens: Array, g: Array
) -> tuple[Array, None]:
    total = _zeros_after(g, shape, dtype)

    def add(start: Array | int, count: int, bits: Array) -> Array:
        piece = _zeros_after(g, (count, shape[1]), jnp.float32)
        piece = piece.at[_within(tokens - start, count)].add(
            g.astype(jnp.float32), mode="drop"
        )
        return lax.dynamic_update_slice_in_dim(
            bits, to_bits(piece.astype(dtype)), start, 0
        )

    rows = rows_at_a_time(total, group_bytes())
    bits = in_pieces(add, shape[0], rows, to_bits(total))
    return from_bits(bits, total.dtype), None


_take.defvjp(_take_forward, _take_backward)


def _dot(x: Array, table: Array, axis: int) -> Array:
    """Returns the products of features with the entries of a table along an axis."""
    return lax.dot_general(x, table, (((x.ndim - 1,), (1 - axis,)), ((), ())))


def _zeros_after(g: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Returns zeros that are there only when `g` is, and not laid out long before."""
    return jnp.full(shape, after(jnp.int32(0), g).astype(dtype))


def _within(index: Array, size: int) -> Array:
    """Returns indices, those below zero moved beyond the end."""
    return jnp.where(index < 0, size, index)
