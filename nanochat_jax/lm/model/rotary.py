"""Rotary positions: heads rotated by their positions, plain or scaled as in Llama 3."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int


def rotate(
    x: Float[Array, "B S heads H"],
    positions: Int[Array, "S"],
    theta: float,
    scaling: tuple[float, ...] = (),
) -> Float[Array, "B S heads H"]:
    """Rotates heads by their positions (Su et al., 2021).

    Rotates the pair `(x[i], x[i + H/2])` by `position * theta^(-2i/H)`, so that the
    product of two rotated heads depends only on the distance of their positions.

    Args:
      x: Queries or keys, with an even H.
      positions: Position of each token.
      theta: Base of the frequencies.
      scaling: Scaling of the frequencies, as `rope_scaling` of `ModelConfig`.

    Returns:
      The rotated heads, in the dtype of `x`.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling:
        frequencies = _scaled(frequencies, *scaling)
    angles = jnp.outer(positions, frequencies)[None, :, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return rotated.astype(x.dtype)


def _scaled(
    frequencies: Float32[Array, "half"],
    factor: float,
    low: float,
    high: float,
    length: float,
) -> Float32[Array, "half"]:
    """Returns frequencies for sequences longer by a factor (Llama 3.1, 2024).

    A frequency with fewer than `low` turns over the former length is divided by the
    factor, one with more than `high` is kept, and between them is the line.
    """
    turns = frequencies * length / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies
