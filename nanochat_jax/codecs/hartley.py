"""A fixed rotation of each block, after which its entries look normally distributed."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from nanochat_jax.codecs import blocks


def rotate(
    x: Float32[Array, "*rows n"], block_size: int, *, back: bool = False
) -> Float32[Array, "*rows n"]:
    """Returns each block of the last axis times a fixed orthogonal matrix.

    Large single entries are spread over their block. A shorter last block has a matrix
    of its own size.

    Args:
      x: Array to rotate.
      block_size: Entries of a block.
      back: Whether to undo the rotation.
    """
    size = min(block_size, x.shape[-1])
    full = x.shape[-1] // size * size
    parts = [(x[..., :full], size), (x[..., full:], x.shape[-1] - full)]
    return jnp.concatenate(
        [_rotate_blocks(part, size, back) for part, size in parts if size], axis=-1
    )


def _rotate_blocks(x: Array, size: int, back: bool) -> Array:
    """Rotates blocks of `size` that divide the last axis."""
    matrix = jnp.asarray(_matrix(size).T if back else _matrix(size))
    # Highest: a rounded product would not be a rotation.
    rotated = jnp.matmul(blocks.split(x, size), matrix, precision="highest")
    return blocks.join(rotated, x.shape[-1])


@functools.cache
def _matrix(size: int) -> np.ndarray:
    """Returns the Hartley transform of a block with the signs of Rudin and Shapiro.

    The transform alone spreads single entries, but turns equal entries into a single
    one. The signs have a flat spectrum, so that these are spread too.
    """
    k = np.arange(size)
    angles = 2 * np.pi / size * (np.outer(k, k) % size)
    hartley = (np.cos(angles) + np.sin(angles)) / np.sqrt(size)
    signs = 1 - 2.0 * (np.bitwise_count(k & (k >> 1)) % 2)
    return (signs[:, None] * hartley).astype(np.float32)
