"""Arrays as bfloat16: half the bytes of float32, for any field of a state."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from nanochat_jax.codecs.base import Quantized
from nanochat_jax.numerics import hashing


@dataclasses.dataclass(frozen=True)
class BFloat16:
    """A cast to bfloat16, which keeps the range of float32 and 8 of its 24 digits.

    Each entry is a block of its own, so sizes may be mixed in any way, and an entry is
    within 0.4 % of itself. It suits fields that fewer bits do not, such as bases and
    averages of second order. Rounding to nearest loses changes of under 0.2 % for good;
    stochastic rounding keeps them on average.

    Example:
      >>> stored = BFloat16().encode(jnp.asarray([1.0, 1e-30, -3e8]))
      >>> stored.codes.dtype.name, stored.scales.shape
      ('bfloat16', (1,))

    Attributes:
      stochastic_rounding: Whether to round up with the probability of the remainder,
        which is unbiased and has √2 times the error of rounding to nearest.
    """

    stochastic_rounding: bool = False

    @property
    def name(self) -> str:
        """Short name for reports."""
        return "bfloat16"

    @property
    def needs_key(self) -> bool:
        """Whether `encode` needs a key."""
        return self.stochastic_rounding

    def encode(
        self, x: Float[Array, "*rows n"], key: PRNGKeyArray | None = None
    ) -> Quantized:
        """Rounds each entry to bfloat16.

        Args:
          x: Array to store.
          key: Key of the rounding, required if it is stochastic.

        Returns:
          The rounded array as codes, and a scale of one for each row.

        Raises:
          ValueError: If the rounding is stochastic and there is no key.
        """
        dtype, x = x.dtype, x.astype(jnp.float32)
        if self.stochastic_rounding:
            if key is None:
                raise ValueError("Stochastic rounding needs a `key`, got None.")
            x = _dithered(x, key)
        # What handles stored arrays finds codes and scales in all of them.
        scales = jnp.ones((*x.shape[:-1], 1), jnp.bfloat16)
        return Quantized(x.astype(jnp.bfloat16), scales, self, x.shape[-1], dtype)

    def decode(self, stored: Quantized) -> Float32[Array, "*rows n"]:
        """Returns the decoded array, in float32."""
        codes, scales = (x.astype(jnp.float32) for x in (stored.codes, stored.scales))
        # A part that is not read cannot be written over.
        return codes * jnp.broadcast_to(scales, codes.shape)


def _dithered(x: Array, key: PRNGKeyArray) -> Array:
    """Returns numbers that bfloat16 holds exactly, rounded up or down at random."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    below = (hashing.uniform(key, x.shape) * 2**16).astype(jnp.uint32)
    rounded = (bits + below) & jnp.uint32(0xFFFF0000)
    # The bits of an infinity with anything added to them are those of no number.
    rounded = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x)
