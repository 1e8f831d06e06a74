"""Codecs: how an optimizer state leaf is stored between two steps.

A codec is a pair `encode`, `decode` with two laws:

  * `decode(encode(x))` is within half a quantisation step of `x` (a whole step if the
    rounding is stochastic);
  * `encode(decode(q)) == q` if the rounding is to nearest: storing again what was
    stored changes nothing.

Blocks divide the last axis and never cross a row, so codes and scales are sharded as
the array they stand for. The last block of a row may be shorter than the others.
"""

import dataclasses
from typing import ClassVar, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, PRNGKeyArray, Shaped

ScaleDtype = Literal["float32", "bfloat16"]


class Quantized(NamedTuple):
    """An array kept as integer codes, with one scale for each block of its last axis.

    Attributes:
      codes: `[*rows, n]`, or `[*rows, ceil(n / 2)]` where a byte holds two codes.
      scales: `[*rows, ceil(n / block_size)]`, the value of code one.
    """

    codes: Shaped[Array, "*rows _"]
    scales: Float[Array, "*rows blocks"]


class Codec(Protocol):
    """What `quantize_state` asks of a codec."""

    @property
    def name(self) -> str:
        """Short name for reports, such as `"int8"`."""
        ...

    @property
    def needs_key(self) -> bool:
        """Whether `encode` needs a key, because it rounds stochastically."""
        ...

    def encode(
        self, x: Float[Array, "*rows n"], key: PRNGKeyArray | None = None
    ) -> Quantized:
        """Returns `x` in stored form."""
        ...

    def decode(self, stored: Quantized, size: int) -> Float32[Array, "*rows n"]:
        """Returns the array, of last axis `size`, that `stored` stands for."""
        ...


@dataclasses.dataclass(frozen=True)
class _Linear:
    """Symmetric linear codes with an absolute-maximum scale for each block.

    Subclasses say how many levels there are on each side of zero, and how codes lie in
    memory.
    """

    block_size: int = 128
    stochastic_rounding: bool = False
    scale_dtype: ScaleDtype = "float32"
    levels: ClassVar[int]

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"`block_size` must be at least 1, got {self.block_size}.")

    @property
    def name(self) -> str:
        """Short name for reports."""
        return type(self).__name__.lower()

    @property
    def needs_key(self) -> bool:
        """Whether `encode` needs a key."""
        return self.stochastic_rounding

    def encode(
        self, x: Float[Array, "*rows n"], key: PRNGKeyArray | None = None
    ) -> Quantized:
        """Rounds each block of `x` to evenly spaced levels.

        Args:
          x: Array to store.
          key: Key of the rounding, required if it is stochastic.

        Returns:
          Codes and their scales.

        Raises:
          ValueError: If the rounding is stochastic and there is no key.
        """
        codes, scales = _encode_linear(x, self, key)
        return Quantized(self._pack(codes), scales)

    def decode(self, stored: Quantized, size: int) -> Float32[Array, "*rows n"]:
        """Returns the array, of last axis `size`, that `stored` stands for."""
        codes = self._unpack(stored.codes, size)
        return _decode_linear(Quantized(codes, stored.scales), self.block_size)

    def _pack(self, codes: Array) -> Array:
        return codes

    def _unpack(self, codes: Array, size: int) -> Array:
        del size
        return codes


class Int8(_Linear):
    """Symmetric linear 8-bit codes with an absolute-maximum scale for each block.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (16, 200))
      >>> stored = Int8().encode(x)
      >>> stored.codes.shape, stored.scales.shape  # 200 = 128 + 72
      ((16, 200), (16, 2))

    Attributes:
      block_size: Entries of the last axis that share one scale.
      stochastic_rounding: Whether to round up with the probability of the remainder,
        which is unbiased and has √2 times the error of rounding to nearest.
      scale_dtype: Type of the scales.
    """

    levels = 127


class Int4(_Linear):
    """Symmetric linear 4-bit codes, two to a byte, with a scale for each block.

    Neighbours on the last axis share a byte, the even one in its low half. An odd last
    axis leaves the last half byte zero.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (16, 200))
      >>> stored = Int4().encode(x)
      >>> stored.codes.shape, stored.codes.dtype.name
      ((16, 100), 'uint8')

    Attributes:
      block_size: Entries of the last axis that share one scale.
      stochastic_rounding: As for `Int8`.
      scale_dtype: Type of the scales.
    """

    levels = 7

    def _pack(self, codes: Array) -> Array:
        return _pack(codes)

    def _unpack(self, codes: Array, size: int) -> Array:
        return _unpack(codes, size)


def _encode_linear(x: Array, codec: _Linear, key: PRNGKeyArray | None) -> Quantized:
    """Divides blocks by their scale and rounds to integers in ±`codec.levels`."""
    if codec.needs_key and key is None:
        raise ValueError("Stochastic rounding needs a `key`, got None.")
    blocks = _split(x.astype(jnp.float32), codec.block_size)
    scales = jnp.max(jnp.abs(blocks), axis=-1) / codec.levels
    scales = scales.astype(codec.scale_dtype)
    # Dividing by the scale as it is stored keeps the error within half a step of it.
    steps = jnp.where(scales > 0, scales, 1).astype(jnp.float32)[..., None]
    codes = blocks / steps
    if codec.stochastic_rounding and key is not None:
        codes = jnp.floor(codes + jax.random.uniform(key, codes.shape, codes.dtype))
    else:
        codes = jnp.round(codes)
    codes = jnp.clip(codes, -codec.levels, codec.levels).astype(jnp.int8)
    return Quantized(_join(codes, x.shape[-1]), scales)


def _decode_linear(stored: Quantized, block_size: int) -> Array:
    blocks = _split(stored.codes, block_size).astype(jnp.float32)
    scaled = blocks * stored.scales[..., None].astype(jnp.float32)
    return _join(scaled, stored.codes.shape[-1])


def _split(x: Array, block_size: int) -> Array:
    """Returns `x` as `[*rows, blocks, block_size]`, padded with zeros at the end."""
    size = min(block_size, x.shape[-1])
    widths = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    return jnp.pad(x, widths).reshape(*x.shape[:-1], -1, size)


def _join(blocks: Array, size: int) -> Array:
    return blocks.reshape(*blocks.shape[:-2], -1)[..., :size]


def _pack(codes: Array) -> Array:
    """Packs codes in [-7, 7] two to a byte, as the low half bytes of their int8."""
    pairs = _split(codes, 2) if codes.shape[-1] > 1 else codes[..., None]
    halves = jax.lax.bitcast_convert_type(pairs, jnp.uint8) & 0xF
    high = halves[..., 1] if halves.shape[-1] == 2 else jnp.zeros_like(halves[..., 0])
    return halves[..., 0] | (high << 4)


def _unpack(packed: Array, size: int) -> Array:
    """Undoes `_pack`; shifting right arithmetically restores the sign."""
    signed = jax.lax.bitcast_convert_type(packed, jnp.int8)
    pairs = jnp.stack([(signed << 4) >> 4, signed >> 4], axis=-1)
    return _join(pairs, size)
