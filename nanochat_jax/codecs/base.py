"""What every codec has in common: its interface, and one scale for each block."""

import abc
import dataclasses
import functools
import math
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from nanochat_jax.codecs import blocks

ScaleDtype = Literal["float32", "bfloat16"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales"),
    meta_fields=("codec", "width", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An array stored as short codes, with one scale for each block of its last axis.

    It describes itself: codec, width and type are static, so that a state is read,
    moved and reported without the transform that made it.

    Example:
      >>> stored = Int4(64).encode(jnp.ones((16, 200), jnp.bfloat16))
      >>> stored.shape, stored.dtype.name, stored.codec.name, stored.nbytes
      ((16, 200), 'bfloat16', 'int4', 1856)
      >>> stored.decode().dtype.name
      'float32'

    Attributes:
      codes: `[*rows, width]`, or `[*rows, ceil(width / k)]` with `k` codes to a byte.
      scales: `[*rows, ceil(width / block_size)]`, factors from levels to values.
      codec: Codec of the codes.
      width: Size of the last axis, which codes do not tell if two share a byte.
      dtype: Type of the array.
    """

    # Any: transformations of JAX put shapes, shardings and markers in their place.
    codes: Any
    scales: Any
    codec: "Codec"
    width: int
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return (*self.codes.shape[:-1], self.width)

    @property
    def ndim(self) -> int:
        """Number of axes of the array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries of the array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(
            math.prod(x.shape) * x.dtype.itemsize for x in (self.codes, self.scales)
        )

    def decode(self) -> Float32[Array, "..."]:
        """Returns the array in float32, whatever its type."""
        return _decode(self)


# Traced once for each codec and shape, not once for each of many leaves.
@jax.jit
def _decode(stored: Quantized) -> Array:
    return stored.codec.decode(stored)


def is_quantized(node: Any) -> bool:
    """Returns whether a tree node is a `Quantized` array; for `is_leaf` arguments."""
    return isinstance(node, Quantized)


class Codec(Protocol):
    """Interface of a codec, a hashable value without state."""

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

    def decode(self, stored: Quantized) -> Float32[Array, "*rows n"]:
        """Returns the decoded array."""
        ...


@dataclasses.dataclass(frozen=True)
class Blockwise(abc.ABC):
    """A codec that divides each block by a scale and rounds the quotients to levels.

    The scale of a block is the least for which no quotient is beyond the outermost
    levels, so the entry that sets it is a level itself, and is stored exactly but for
    the rounding of the scale. Subclasses have the levels.
    """

    block_size: int = 128
    scale_dtype: ScaleDtype = dataclasses.field(default="float32", kw_only=True)

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
        return False

    def encode(
        self, x: Float[Array, "*rows n"], key: PRNGKeyArray | None = None
    ) -> Quantized:
        """Rounds each block of `x` to the codec's levels times the block's scale.

        Args:
          x: Array to store.
          key: Key of the rounding, required if it is stochastic.

        Returns:
          Codes and their scales.

        Raises:
          ValueError: If the rounding is stochastic and there is no key.
        """
        dtype, x = x.dtype, x.astype(jnp.float32)
        scales = self._scales(x).astype(self.scale_dtype)
        # Dividing by the scale as it is stored keeps the error within its bound.
        steps = jnp.where(scales != 0, scales, 1).astype(jnp.float32)
        # Spreading the scales out, not padding `x`, spares a copy of `x`.
        quotients = x / blocks.spread(steps, self.block_size, x.shape[-1])
        codes = self._pack(self._round(quotients, key))
        return Quantized(codes, scales, self, x.shape[-1], dtype)

    def decode(self, stored: Quantized) -> Float32[Array, "*rows n"]:
        """Returns the decoded array, in float32."""
        levels = self._levels_of(self._unpack(stored.codes, stored.width))
        scales = stored.scales.astype(jnp.float32)
        return levels * blocks.spread(scales, self.block_size, stored.width)

    def _scales(self, x: Array) -> Array:
        """Returns the scale of each block."""
        x_blocks = blocks.split(x, self.block_size)
        lowest, highest = self._range
        return jnp.maximum(
            jnp.max(x_blocks, axis=-1) / highest, jnp.min(x_blocks, axis=-1) / lowest
        )

    @property
    @abc.abstractmethod
    def _range(self) -> tuple[float, float]:
        """The outermost quotients, one on each side of zero."""

    @abc.abstractmethod
    def _round(self, quotients: Array, key: PRNGKeyArray | None) -> Array:
        """Returns the codes of quotients, which are in `_range` or barely beyond."""

    @abc.abstractmethod
    def _levels_of(self, codes: Array) -> Array:
        """Returns the levels of codes, in float32."""

    def _pack(self, codes: Array) -> Array:
        return codes

    def _unpack(self, codes: Array, size: int) -> Array:
        del size
        return codes
