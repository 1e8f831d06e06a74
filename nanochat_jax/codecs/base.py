"""What every codec has in common: its interface, and one scale for each block."""

import abc
import dataclasses
from typing import Literal, NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, PRNGKeyArray, Shaped

from nanochat_jax.codecs import blocks

ScaleDtype = Literal["float32", "bfloat16"]


class Quantized(NamedTuple):
    """An array kept as short codes, with one scale for each block of its last axis.

    Attributes:
      codes: `[*rows, n]`, or `[*rows, ceil(n / k)]` where a byte holds `k` codes.
      scales: `[*rows, ceil(n / block_size)]`, what the level of a code is multiplied
        by.
    """

    codes: Shaped[Array, "*rows _"]
    scales: Float[Array, "*rows blocks"]


class Codec(Protocol):
    """What `quantize_state` asks of a codec, a hashable value without state."""

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
        x = x.astype(jnp.float32)
        scales = self._scales(x).astype(self.scale_dtype)
        # Dividing by the scale as it is stored keeps the error within its bound.
        steps = jnp.where(scales != 0, scales, 1).astype(jnp.float32)
        # Spreading the scales out, not padding `x`, spares a copy of `x`.
        quotients = x / blocks.spread(steps, self.block_size, x.shape[-1])
        return Quantized(self._pack(self._round(quotients, key)), scales)

    def decode(self, stored: Quantized, size: int) -> Float32[Array, "*rows n"]:
        """Returns the array, of last axis `size`, that `stored` stands for."""
        levels = self._levels_of(self._unpack(stored.codes, size))
        scales = stored.scales.astype(jnp.float32)
        return levels * blocks.spread(scales, self.block_size, size)

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
