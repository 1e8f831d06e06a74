"""Rotary positions of queries and keys, and causal attention.

Attention works on a part of the queries at a time. They attend to no later key, so a
part needs the keys up to its end only: with `n` parts `(1 + 1/n) / 2` of the products.

Axes: B batch, S sequence, T keys up to the end of a part, N query heads, K key and
value heads, G query heads that share a key, H head size.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nanochat_jax.transforms import after

PARTS = 4
"""Parts of the queries: more save little, and each is compiled."""

SHORTEST_PART = 64
"""Queries of a part; on a processor fewer were slower."""


def rotate(
    x: Float[Array, "B S heads H"],
    positions: Int[Array | np.ndarray, "S"],
    theta: float,
    scaling: tuple[float, ...] = (),
) -> Float[Array, "B S heads H"]:
    """Rotates heads by their positions (Su et al., 2021).

    Rotates the pair `(x[i], x[i + H/2])` by `position * theta^(-2i/H)`, so that the
    product of two rotated heads depends only on the distance of their positions.

    Args:
      x: Queries or keys, with an even H.
      positions: Position of each token. Of NumPy's the sines are constants of the
        program; of others a processor works them out again for each entry of `x`.
      theta: Base of the frequencies.
      scaling: Scaling of the frequencies, as `rope_scaling` of `ModelConfig`.

    Returns:
      The rotated heads, in the dtype of `x`.
    """
    frequencies = _frequencies(x.shape[-1] // 2, theta, scaling)
    library: Any = np if isinstance(positions, np.ndarray) else jnp
    angles = library.outer(positions, frequencies)[None, :, None, :]
    cos, sin = library.cos(angles), library.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return rotated.astype(x.dtype)


def causal_attention(
    query: Float[Array, "B S N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    keep_scores: bool = True,
) -> Float[Array, "B S N H"]:
    """Returns scaled dot-product attention to the keys up to each position.

    Scores and their normalisation are in float32, whatever the type of the arguments.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 256, 4, 8))
      >>> causal_attention(x, x, x).shape
      (2, 256, 4, 8)

    Args:
      query: Queries.
      key: Keys, of as many heads or of a divisor of them.
      value: Values, of as many heads as keys.
      keep_scores: Whether the scores are kept for the backward pass, half of `S²` for
        each head, and not computed again there.
    """
    attend = _attend if keep_scores else _attend_again
    heads_first = lambda x: x.transpose(0, 2, 1, 3)
    groups = query.shape[2] // key.shape[2]
    query, key, value = map(heads_first, (query, key, value))
    query = query.reshape(*key.shape[:2], groups, *query.shape[2:])
    y = attend(query, key, value)
    return heads_first(y.reshape(y.shape[0], -1, *y.shape[3:]))


def largest_scores(
    query: Float[Array, "B S N H"], key: Float[Array, "B S K H"]
) -> Float[Array, "N"]:
    """Returns the largest score of each head, over sequences and positions.

    Args:
      query: Queries.
      key: Keys, of as many heads or of a divisor of them.
    """
    heads_first = lambda x: x.transpose(0, 2, 1, 3)
    groups = query.shape[2] // key.shape[2]
    query, key = heads_first(query), heads_first(key)
    query = query.reshape(*key.shape[:2], groups, *query.shape[2:])
    ends = _ends(key.shape[2])
    largest = []
    for start, end in zip([0, *ends], ends, strict=False):
        part = query[..., start:end, :]
        scores = _scores(start, part, key[..., :end, :])
        largest.append(scores.reshape(*part.shape[:-1], end).max((0, 3, 4)))
    return functools.reduce(jnp.maximum, largest).reshape(-1)


def _attend(
    query: Float[Array, "B K G S H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
) -> Float[Array, "B K G S H"]:
    ends = _ends(key.shape[2])
    parts = [
        _attend_part(
            start, query[..., start:end, :], key[..., :end, :], value[..., :end, :]
        )
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    return jnp.concatenate(parts, axis=3)


def _ends(length: int) -> list[int]:
    """Returns where each part of the queries ends."""
    size = max(SHORTEST_PART, -(-length // PARTS))
    return [min(end, length) for end in range(size, length + size, size)]


def _attend_part(start: int, query: Array, key: Array, value: Array) -> Array:
    """Returns the attention of queries from `start` on to keys up to their last."""
    scores = _scores(start, query, key)
    # Cancels out, and so has no gradient.
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    y = jnp.einsum(
        "...rt,...th->...rh",
        weights.astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    return (y / total).astype(value.dtype).reshape(query.shape)


def _scores(start: int, query: Array, key: Array) -> Float[Array, "B K GS T"]:
    """Returns scores of queries from `start` on; of later keys they are -inf."""
    *batch, groups, length, size = query.shape
    # Heads that share a key are more rows of one product.
    rows = query.reshape(*batch, groups * length, size)
    scores = jnp.einsum(
        "...rh,...th->...rt", rows, key, preferred_element_type=jnp.float32
    )
    position = jnp.tile(start + jnp.arange(length), groups)
    seen = jnp.arange(key.shape[-2])[None] <= position[:, None]
    seen = seen.reshape(*(1 for _ in batch), *seen.shape)
    return jnp.where(seen, scores * size**-0.5, -jnp.inf)


@jax.custom_vjp
def _attend_again(query: Array, key: Array, value: Array) -> Array:
    """Returns `_attend`, which keeps no scores for the backward pass."""
    return _attend(query, key, value)


def _forward(*inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    return _attend(*inputs), inputs


def _backward(inputs: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    query, key, value = inputs
    d_query, d_key, d_value = [], jnp.zeros_like(key), jnp.zeros_like(value)
    ends, result = _ends(key.shape[2]), g
    for start, end in zip([0, *ends], ends, strict=False):
        part = query[..., start:end, :], key[..., :end, :], value[..., :end, :]
        # Scores are computed again one part after another, once a gradient is there.
        waiting = [x + after(jnp.int32(0), result).astype(x.dtype) for x in part]
        attend = functools.partial(_attend_part, start)
        d_part = jax.vjp(attend, *waiting)[1](g[..., start:end, :])
        d_query.append(d_part[0])
        d_key = d_key.at[..., :end, :].add(d_part[1])
        d_value = d_value.at[..., :end, :].add(d_part[2])
        result = d_part
    return jnp.concatenate(d_query, axis=3), d_key, d_value


_attend_again.defvjp(_forward, _backward)


def _frequencies(half: int, theta: float, scaling: tuple[float, ...]) -> np.ndarray:
    """Returns the angle of each pair at position 1, `[half]` in float32."""
    frequencies = theta ** (-np.arange(half) / half)
    if scaling:
        frequencies = _scaled(frequencies, *scaling)
    return frequencies.astype(np.float32)


def _scaled(
    frequencies: np.ndarray, factor: float, low: float, high: float, length: float
) -> np.ndarray:
    """Returns frequencies for sequences longer by a factor (Llama 3.1, 2024).

    A frequency with fewer than `low` turns over the former length is divided by the
    factor, one with more than `high` is kept, and between them is the line.
    """
    turns = frequencies * length / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies
