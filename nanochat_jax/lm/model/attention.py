"""Rotary positions of queries and keys, and causal attention.

Attention works on a part of the queries at a time. They attend to no later key, so a
part needs the keys up to its end only: with `n` parts `(1 + 1/n) / 2` of the products.

Axes: B batch, S sequence, T keys up to the end of a part, N query heads, K key and
value heads, G query heads that share a key, H head size.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from nanochat_jax.lm.model.recomputed import Recomputed, as_recomputed, held_back

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
    query: Float[Array, "B S N H"] | Recomputed,
    key: Float[Array, "B S K H"] | Recomputed,
    value: Float[Array, "B S K H"] | Recomputed,
    *,
    keep_scores: bool = True,
) -> Float[Array, "B N S H"]:
    """Returns scaled dot-product attention to the keys up to each position.

    Scores and their normalisation are in float32, whatever the type of the arguments.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 256, 4, 8))
      >>> causal_attention(x, x, x).shape
      (2, 4, 256, 8)

    Args:
      query: Queries.
      key: Keys, of as many heads or of a divisor of them.
      value: Values, of as many heads as keys.
      keep_scores: Whether the weights of keys are kept for the backward pass, half of
        `S²` for each head, and not computed again there.
    """
    given = [as_recomputed(x) for x in (query, key, value)]

    def heads(*inputs: tuple[Any, ...]) -> list[Array]:
        pairs = zip(given, inputs, strict=True)
        return _heads_first(*(x.of(*own) for x, own in pairs))

    y: Any = _attend(keep_scores, heads, tuple(x.inputs for x in given))
    return y.reshape(y.shape[0], -1, *y.shape[3:])


def largest_scores(
    query: Float[Array, "B S N H"], key: Float[Array, "B S K H"]
) -> Float[Array, "N"]:
    """Returns the largest score of each head, over sequences and positions.

    Args:
      query: Queries.
      key: Keys, of as many heads or of a divisor of them.
    """
    query, key = _heads_first(query, key)
    largest = []
    for start, end in _spans(key.shape[2]):
        part = query[..., start:end, :]
        scores = _scores(start, part, key[..., :end, :])
        largest.append(scores.reshape(*part.shape[:-1], end).max((0, 3, 4)))
    return functools.reduce(jnp.maximum, largest).reshape(-1)


class _Weights(NamedTuple):
    """Weights of keys, and their sums, which products with them are divided by."""

    weights: Float[Array, "B K GS T"]
    sums: Float[Array, "B K GS 1"]


def _heads_first(query: Array, *others: Array) -> list[Array]:
    """Returns queries `[B, K, G, S, H]`, and keys and values `[B, K, S, H]`."""
    heads_first = lambda x: x.transpose(0, 2, 1, 3)
    groups = query.shape[2] // others[0].shape[2]
    first, *rest = map(heads_first, (query, *others))
    grouped = (*rest[0].shape[:2], groups, *first.shape[2:])
    return [first.reshape(grouped), *rest]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    keep_scores: bool, heads: Callable[..., list[Array]], inputs: tuple[Any, ...]
) -> Float[Array, "B K G S H"]:
    """Returns attention of `heads(*inputs)`, which the backward pass makes again.

    If no scores are kept, one part is worked on after another.
    """
    return _forward(keep_scores, heads, inputs)[0]


def _forward(
    keep_scores: bool, heads: Callable[..., list[Array]], inputs: tuple[Any, ...]
) -> tuple[Array, tuple[Any, ...]]:
    parts, kept = [], []
    whole = heads(*inputs)
    for start, end in _spans(whole[1].shape[2]):
        together = keep_scores or not parts
        given = whole if together else _in_turn(whole, parts[-1])
        query, key, value = _part(start, end, *given)
        found = _weights(start, query, key)
        y = _dot("rt,th->rh", found.weights, value) / found.sums
        parts.append(y.astype(value.dtype).reshape(query.shape))
        kept.append(found)
    y = jnp.concatenate(parts, axis=3)
    return y, (inputs, y, kept if keep_scores else [])


def _backward(
    keep_scores: bool,
    heads: Callable[..., list[Array]],
    kept: tuple[Any, ...],
    g: Array,
) -> tuple[tuple[Any, ...]]:
    inputs, y, weights = kept
    # Means of the weights' gradients, by the weights, as sums over the entries of a
    # head: over keys, processors add them up at a tenth of the speed.
    means = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)
    whole, d_inputs = jax.vjp(heads, *held_back(inputs, g))
    d_query, d_key, d_value = [], *map(jnp.zeros_like, whole[1:])
    result = g
    for i, (start, end) in enumerate(_spans(whole[1].shape[2])):
        part = _part(start, end, *(whole if keep_scores else _in_turn(whole, result)))
        found = weights[i] if keep_scores else _weights(start, *part[:2])
        result = _d_part(found, part, g[..., start:end, :], means[..., start:end])
        d_query.append(result[0])
        d_key = d_key.at[..., :end, :].add(result[1])
        d_value = d_value.at[..., :end, :].add(result[2])
    return (d_inputs([jnp.concatenate(d_query, axis=3), d_key, d_value]),)


_attend.defvjp(_forward, _backward)
_in_turn = functools.partial(held_back, on_meshes=True)


def _spans(length: int) -> list[tuple[int, int]]:
    """Returns where each part of the queries starts and ends."""
    size = max(SHORTEST_PART, -(-length // PARTS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _part(start: int, end: int, query: Array, key: Array, value: Array) -> list[Array]:
    """Returns queries from `start` to `end`, with the keys and values up to there."""
    return [query[..., start:end, :], key[..., :end, :], value[..., :end, :]]


def _weights(start: int, query: Array, key: Array) -> _Weights:
    """Returns the weights of keys for queries from `start` on."""
    scores = _scores(start, query, key)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return _Weights(weights, weights.sum(-1, keepdims=True))


def _d_part(
    found: _Weights, part: list[Array], g: Array, means: Array
) -> tuple[Array, ...]:
    """Returns the gradients of a part of the queries, and of its keys and values."""
    query, key, value = part
    weights, sums = found
    rows = lambda x: x.reshape(*weights.shape[:-1], -1)
    g = rows(g).astype(jnp.float32) / sums
    d_weights = _dot("rh,th->rt", g, value) - rows(means) / sums
    d_scores = weights * d_weights * query.shape[-1] ** -0.5
    d_query = _dot("rt,th->rh", d_scores, key).reshape(query.shape)
    d_key = _dot("rt,rh->th", d_scores, rows(query))
    d_value = _dot("rt,rh->th", weights, g.astype(value.dtype))
    grads = zip((d_query, d_key, d_value), part, strict=True)
    return tuple(x.astype(like.dtype) for x, like in grads)


def _dot(axes: str, x: Array, y: Array) -> Float32[Array, "..."]:
    """Returns products in the type of `y` for each sequence and head."""
    axes = "..." + axes.replace(",", ",...").replace("->", "->...")
    return jnp.einsum(axes, x.astype(y.dtype), y, preferred_element_type=jnp.float32)


def _scores(start: int, query: Array, key: Array) -> Float[Array, "B K GS T"]:
    """Returns scores of queries from `start` on; of later keys they are -inf."""
    *batch, groups, length, size = query.shape
    # Heads that share a key are more rows of one product.
    rows = query.reshape(*batch, groups * length, size)
    scores = _dot("rh,th->rt", rows, key)
    position = jnp.tile(start + jnp.arange(length), groups)
    seen = jnp.arange(key.shape[-2])[None] <= position[:, None]
    seen = seen.reshape(*(1 for _ in batch), *seen.shape)
    return jnp.where(seen, scores * size**-0.5, -jnp.inf)


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
