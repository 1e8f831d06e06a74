"""Cross-entropy in chunks of positions, so that the logits never exist in full.

With a large vocabulary the logits, `[B, S, V]` in float32, are the largest arrays of a
training step. Here logits are computed in chunks, and the gradients of a chunk while
its logits exist: the gradient of the head is summed, that of the features stored.
Nothing is computed twice, unlike with `jax.checkpoint`.

Axes: B batch, S sequence, C chunks, P positions of a chunk, D features, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int

Loss = Callable[[Array, Array, Array], Array]
"""Maps weights, features `[*batch, D]` and labels `[*batch]` to their summed loss."""

_NOT_PREDICTED = -1


def cross_entropy(
    loss: Loss,
    weights: Float[Array, "..."],
    x: Float[Array, "B S D"],
    labels: Int[Array, "B S"],
    chunk: int = 0,
    predictions: ArrayLike | None = None,
) -> Float32[Array, ""]:
    """Returns the mean loss of labels.

    Example:
      >>> loss = lambda weights, x, labels: jnp.sum(x @ weights)
      >>> x, labels = jnp.ones((2, 6, 4)), jnp.zeros((2, 6), jnp.int32)
      >>> float(cross_entropy(loss, jnp.zeros((4, 1)), x, labels, chunk=8))
      0.0

    Args:
      loss: Function to the sum of the losses of labels.
      weights: Its weights.
      x: Features.
      labels: Index of the correct logit at each position; those below zero are not
        predicted.
      chunk: Most pairs of sequence and position whose logits exist at a time, at least
        one position of all sequences; 0 for all.
      predictions: Number that the sum is divided by; by default that of the labels that
        are predicted.

    Returns:
      The mean over labels that are predicted. Its gradient is that of the plain mean,
      summed in another order. With more than one chunk it has no forward-mode
      derivative.
    """
    chunks = _count_chunks(labels.shape, chunk)
    if predictions is None:
        predictions = jnp.sum(labels >= 0)
    # The mean over microbatches may be a fraction; without any the loss is 0.
    predictions = jnp.asarray(predictions, jnp.float32)
    scale = 1 / jnp.where(predictions > 0, predictions, 1)
    if chunks == 1:
        return loss(weights, x, labels) * scale
    parts = _split(x, chunks), _split(labels, chunks, fill=_NOT_PREDICTED)
    return _in_chunks(loss, weights, *parts, scale)


def _count_chunks(shape: tuple[int, ...], chunk: int) -> int:
    sequences, length = shape
    positions = max(1, chunk // sequences) if chunk else length
    return -(-length // positions)


def _split(x: Array, chunks: int, fill: int = 0) -> Array:
    """Returns `[B, S, ...]` as `[C, B, P, ...]`, padded at the end of S.

    Positions are divided, not sequences, so that every device works on its own
    sequences in every chunk.
    """
    positions = -(-x.shape[1] // chunks)
    missing = chunks * positions - x.shape[1]
    widths = [(0, missing if axis == 1 else 0) for axis in range(x.ndim)]
    x = jnp.pad(x, widths, constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, positions, *x.shape[2:]), 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_chunks(
    loss: Loss,
    weights: Float[Array, "..."],
    x: Float[Array, "C B P D"],
    labels: Int[Array, "C B P"],
    scale: Float32[Array, ""],
) -> Float32[Array, ""]:
    """Returns the sum of `scale` times `loss` over chunks."""
    add = lambda total, chunk: (total + loss(weights, *chunk) * scale, None)
    return jax.lax.scan(add, jnp.zeros([], jnp.float32), (x, labels))[0]


def _forward(
    loss: Loss, weights: Array, x: Array, labels: Array, scale: Array
) -> tuple[Array, Any]:
    evaluate = jax.value_and_grad(lambda *args: loss(*args) * scale, (0, 1))

    def add(totals: Any, chunk: Any) -> tuple[Any, Array]:
        value, (d_weights, d_x) = evaluate(weights, *chunk)
        total, d_total = totals
        return (total + value, d_total + d_weights.astype(d_total.dtype)), d_x

    # With many chunks, a sum in a short type would lose the last ones.
    dtype = jnp.promote_types(weights.dtype, jnp.float32)
    zero = (jnp.zeros([], jnp.float32), jnp.zeros_like(weights, dtype))
    (value, d_weights), d_x = jax.lax.scan(add, zero, (x, labels))
    return value, (d_weights.astype(weights.dtype), d_x)


def _backward(
    loss: Loss, gradients: tuple[Array, Array], g: Array
) -> tuple[Array, Array, None, None]:
    d_weights, d_x = ((g * x).astype(x.dtype) for x in gradients)
    return d_weights, d_x, None, None


_in_chunks.defvjp(_forward, _backward)
