"""Ways to store momentum in about 4 bits that `momentum_codecs.py` compares.

Each is a function of a matrix and a key that returns the matrix as decoded. The codecs
of the library are among them; the others are experiments, most of which lost.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import nanochat_jax as nj
from nanochat_jax.codecs import blocks
from nanochat_jax.codecs.base import Blockwise
from nanochat_jax.codecs.hartley import rotate
from nanochat_jax.codecs.tables import Levels, TableCodec

RATIOS = (1.0, 0.9, 0.8, 0.7)
NF4 = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip


class Candidate(NamedTuple):
    """A way to store a matrix.

    Attributes:
      bits: Bits an entry takes, scales included, for a matrix of the given shape.
      store: Returns the matrix as decoded.
    """

    bits: float
    store: Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Table4(TableCodec):
    """4-bit codes of any levels, with an absolute-maximum scale."""

    table: Levels = NF4

    @property
    def levels(self):
        return self.table

    def _pack(self, codes):
        return blocks.pack(codes)

    def _unpack(self, codes, size):
        return blocks.unpack(codes, size)


def candidates(shape: tuple[int, int]) -> dict[str, Candidate]:
    m, n = shape
    bfloat16 = {"scale_dtype": "bfloat16"}
    int4, normal = nj.Int4(64, **bfloat16), nj.Normal4()
    rounding = nj.Int4(64, stochastic_rounding=True, **bfloat16)
    codecs = {
        "int8, blocks of 128": nj.Int8(),
        "int4, blocks of 128": nj.Int4(),
        "int4": int4,
        "int4, stochastic": rounding,
        "nf4 levels": Table4(64, **bfloat16),
        "dynamic (3, 4) levels": Table4(64, table=_dynamic(), **bfloat16),
        "mu-law levels, mu 255": Table4(64, table=_mu_law(255.0), **bfloat16),
        "mu-law levels, mu 5": Table4(64, table=_mu_law(5.0), **bfloat16),
        "normal4": normal,
        "normal4, blocks of 128": nj.Normal4(128),
    }
    found = {name: of_codec(codec, shape) for name, codec in codecs.items()}
    bits = found["normal4"].bits
    found |= {
        "normal4, not rotated": Candidate(bits, lambda x, key: _plain(normal, x)),
        "int4, rotated": Candidate(bits, lambda x, key: _rotated(int4, x)),
        "normal4, best of 4 scales": Candidate(bits, lambda x, key: _search(normal, x)),
        "row and column scales": Candidate(
            4 + 16 * (m + n) / (m * n), lambda x, key: _smaller_of_two_scales(x, shape)
        ),
        "the same in tiles of 128": Candidate(
            4 + 2 * 16 / 128, lambda x, key: _smaller_of_two_scales(x, (128, 128))
        ),
        "column scales, normal4": Candidate(
            bits + 16 / m, lambda x, key: _column_scaled(normal, x)
        ),
        "8 directions apart, normal4": Candidate(
            bits + 8 * 8 * (m + n) / (m * n), lambda x, key: _low_rank(normal, x, 8)
        ),
        "normal4, its error kept in 4 bits": Candidate(
            2 * bits, lambda x, key: _with_error(normal, x)
        ),
    }
    return found


def of_codec(codec: nj.Codec, shape: tuple[int, ...]) -> Candidate:
    def store(x, key):
        stored = codec.encode(x, key if codec.needs_key else None)
        return stored.decode()

    like = jax.ShapeDtypeStruct(shape, jnp.float32)
    key = jax.random.key(0) if codec.needs_key else None
    stored = jax.eval_shape(lambda x: codec.encode(x, key), like)
    return Candidate(8 * stored.nbytes / stored.size, store)


def _dynamic() -> Levels:
    """The dynamic map of three decades, with 1, 2 and 4 levels on each side."""
    levels = [0.0, 1.0]
    for i in range(3):
        edges = np.linspace(0.1, 1, 2**i + 1)
        centers = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 2)
        levels += [*centers, *-centers]
    return tuple(float(level) for level in sorted(levels))


def _mu_law(mu: float) -> Levels:
    k = np.arange(-7, 8) / 7
    return tuple((np.sign(k) * np.expm1(np.abs(k) * np.log1p(mu)) / mu).tolist())


def _plain(codec: nj.Normal4, x):
    return Blockwise.decode(codec, Blockwise.encode(codec, x))


def _rotated(codec, x):
    stored = codec.encode(rotate(x, codec.block_size))
    return rotate(stored.decode(), codec.block_size, back=True)


def _search(codec: nj.Normal4, x):
    """Tries smaller scales than the largest entry, and keeps the best of a block."""
    size = codec.block_size
    split = blocks.split(rotate(x, size), size)
    top, low = (f(split, axis=-1, keepdims=True) for f in (jnp.max, jnp.min))
    extreme = jnp.where(top >= -low, top, low)
    best, least = split, jnp.inf
    for ratio in RATIOS:
        scale = (ratio * extreme).astype(jnp.bfloat16).astype(jnp.float32)
        tried = _nearest(split / scale, codec.levels) * scale
        error = jnp.sum((tried - split) ** 2, axis=-1, keepdims=True)
        best = jnp.where(error < least, tried, best)
        least = jnp.minimum(error, least)
    return rotate(blocks.join(best, x.shape[-1]), size, back=True)


def _smaller_of_two_scales(x, tile):
    """Scales an entry by the largest of its row or of its column in a tile."""
    m, n = x.shape
    tiles = x.reshape(m // tile[0], tile[0], n // tile[1], tile[1])
    scales = jnp.minimum(
        *(jnp.max(jnp.abs(tiles), axis=axis, keepdims=True) for axis in (1, 3))
    ).astype(jnp.bfloat16)
    scales = jnp.where(scales > 0, scales, 1).astype(jnp.float32)
    return (_nearest(tiles / scales, NF4) * scales).reshape(x.shape)


def _column_scaled(codec, x):
    scales = jnp.sqrt(jnp.mean(x**2, axis=0, keepdims=True)).astype(jnp.bfloat16)
    scales = jnp.where(scales > 0, scales, 1).astype(jnp.float32)
    return codec.encode(x / scales).decode() * scales


def _low_rank(codec, x, rank):
    """Keeps the leading directions in 8 bits and the complement in 4."""
    directions = jnp.linalg.eigh(x @ x.T)[1][:, -rank:]
    eight = nj.Int8()
    left = eight.encode(directions.T).decode().T
    right = eight.encode(left.T @ x).decode()
    return left @ right + codec.encode(x - left @ right).decode()


def _with_error(codec, x):
    stored = codec.encode(x).decode()
    return stored + codec.encode(x - stored).decode()


def _nearest(x, levels):
    table = jnp.asarray(levels, jnp.float32)
    midpoints = (table[1:] + table[:-1]) / 2
    return table[jnp.sum(x[..., None] >= midpoints, axis=-1)]
