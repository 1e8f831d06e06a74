"""Codecs of 4 and 2 bits for momentum that is orthogonalised."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from nanochat_jax.codecs import blocks
from nanochat_jax.codecs.base import Quantized, ScaleDtype
from nanochat_jax.codecs.hartley import rotate
from nanochat_jax.codecs.tables import Levels, TableCodec, nearest


@dataclasses.dataclass(frozen=True)
class _Normal(TableCodec):
    """A codec of rotated blocks, with levels for normally distributed entries."""

    block_size: int = 64
    scale_dtype: ScaleDtype = dataclasses.field(default="bfloat16", kw_only=True)
    table: ClassVar[Levels]
    bits: ClassVar[int]

    @property
    def levels(self) -> Levels:
        """Levels by code, in units of the block's scale."""
        return self.table

    def encode(
        self, x: Float[Array, "*rows n"], key: PRNGKeyArray | None = None
    ) -> Quantized:
        """Returns `x` in stored form; `key` is not used."""
        rotated = rotate(x.astype(jnp.float32), self.block_size)
        return dataclasses.replace(super().encode(rotated, key), dtype=x.dtype)

    def decode(self, stored: Quantized) -> Float32[Array, "*rows n"]:
        """Returns the decoded array, in float32."""
        return rotate(super().decode(stored), self.block_size, back=True)

    def _pack(self, codes: Array) -> Array:
        return blocks.pack(codes, self.bits)

    def _unpack(self, codes: Array, size: int) -> Array:
        return blocks.unpack(codes, size, self.bits)


class Normal4(_Normal):
    """4-bit codes of rotated blocks, with levels for normally distributed entries.

    Each block is multiplied by a fixed orthogonal matrix, after which its entries are
    nearly normal, so that a few large entries do not coarsen the others. The scale of a
    block is its largest entry with its sign, so that one level, not two, is spent on
    it. At 4.25 bits an entry the error on normal entries is 8.6 %, and hardly depends
    on how sizes are mixed within a block; the error of `Int4` in blocks of 128, of
    about as many bytes, is 11.7 % and depends on it.

    Zeros among other entries do not stay zero. Use it for momentum that is
    orthogonalised, not for moments that are divided by each other.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (16, 256)).at[:, 3].multiply(30)
      >>> error = lambda codec: jnp.linalg.norm(codec.encode(x).decode() - x)
      >>> bool(error(Normal4()) < 0.5 * error(Int4()))
      True

    Attributes:
      block_size: Entries of the last axis that are rotated together and share a scale.
      scale_dtype: Type of the scales.
    """

    bits = 4
    # Least squared error (Lloyd 1957, Max 1960) for 64 normal entries divided by the
    # largest of them, with 0 and 1 held fixed.
    table = (
        -0.8574, -0.6702, -0.5246, -0.4016, -0.2920, -0.1908, -0.0943, 0.0,
        0.0892, 0.1802, 0.2752, 0.3770, 0.4896, 0.6196, 0.7797, 1.0,
    )  # fmt: skip

    def _scales(self, x: Array) -> Array:
        x_blocks = blocks.split(x, self.block_size)
        highest, lowest = jnp.max(x_blocks, axis=-1), jnp.min(x_blocks, axis=-1)
        return jnp.where(highest >= -lowest, highest, lowest)


class Normal2(_Normal):
    """2-bit codes of rotated blocks: a sign and one of two sizes.

    Blocks are rotated as in `Normal4`. The scale minimises the squared error, so
    entries beyond the outermost levels are clipped. At 2.25 bits an entry the error on
    normal entries is 34 %: for momentum of short memory, which forgets errors soon.

    There is no level at zero; only a block of zeros stays zero.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (16, 256))
      >>> Normal2().encode(x).codes.shape
      (16, 64)

    Attributes:
      block_size: Entries of the last axis that are rotated together and share a scale.
      scale_dtype: Type of the scales.
    """

    bits = 2
    # Max (1960), table I, for four levels: 0.4528 and 1.510 deviations.
    table = (-1.0, -0.29987, 0.29987, 1.0)

    def _scales(self, x: Array) -> Array:
        x_blocks = blocks.split(x, self.block_size)
        # Squares of 1e30 or 1e-25 would over- or underflow.
        unit = _power_of_two(jnp.max(jnp.abs(x_blocks), axis=-1))
        # Least squares is over the entries of the array, not over padding.
        inside = blocks.split(jnp.ones(x.shape[-1], x.dtype), self.block_size)
        inside = jnp.broadcast_to(inside, x_blocks.shape)
        squares = jnp.sum((x_blocks / unit[..., None]) ** 2, axis=-1)
        deviation = (unit * jnp.sqrt(squares / jnp.sum(inside, axis=-1)))[..., None]
        outermost = 1.510 * jnp.where(deviation > 0, deviation, 1.0)
        levels = self._levels_of(nearest(x_blocks / outermost, self.levels)) * inside
        return jnp.sum(x_blocks * levels, -1) / jnp.sum(levels**2, -1)


def _power_of_two(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Returns the largest power of two up to each entry, 1 for zero.

    Dividing by it rounds nothing.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    power = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(power > 0, power, 1.0)
