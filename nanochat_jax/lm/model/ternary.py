"""Linear layers with weights of -1, 0 and 1 and activations of 8 bits: BitNet b1.58.

Training updates latent float weights, which every forward pass rounds anew (Ma et al.
2024, "The Era of 1-bit LLMs", section 2; Wang et al. 2023, "BitNet", section 2.2).
Gradients pass the rounding straight through: the gradient of a rounded value is used as
that of the latent one. Scales belong to groups of a column, as in nanochat-rs-ternary.

docs/RESULTS.md has no result for ternary models; they serve the files of that project.

Axes: I input, O output features.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

_INT8_MAX = 127

_kernel_init = nnx.initializers.lecun_normal()


class TernaryLinear(nnx.Module):
    """Linear layer whose activations and weights are rounded before the product."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group_size: int,
        dtype: DTypeLike,
        kernel_init: nnx.Initializer = _kernel_init,
        rngs: nnx.Rngs,
    ):
        """Initialises the latent kernel, float32, as `nnx.Linear` does.

        Args:
          in_features: Size of the input, I.
          out_features: Size of the output, O.
          group_size: Entries of a column that share a scale, as for `ternarize`.
          dtype: Type of the product and its factors; rounding is in float32.
          kernel_init: Initialiser of the kernel.
          rngs: Random streams of the initialisation.
        """
        shape = (in_features, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32))
        self.group_size, self.dtype = group_size, dtype

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """Returns the product of the rounded `x` and the rounded kernel."""
        return _multiply(x, self.kernel[...], self.group_size, self.dtype)


def ternarize(
    kernel: Float[Array, "I O"], group_size: int
) -> tuple[Float[Array, "I O"], Float[Array, "I O"]]:
    """Rounds weights to -1, 0 or 1 times the mean magnitude of their group.

    Args:
      kernel: Weights.
      group_size: Entries of a column, along I, that share a scale. The last group is
        shorter if it does not divide I.

    Returns:
      The signs, -1, 0 or 1, and the scale of each; their product approximates `kernel`.
    """
    rows = kernel.shape[0]
    magnitudes = jnp.pad(jnp.abs(kernel), ((0, -rows % group_size), (0, 0)))
    sums = magnitudes.reshape(-1, group_size, kernel.shape[1]).sum(axis=1)
    members = jnp.minimum(rows - jnp.arange(len(sums)) * group_size, group_size)
    scales = jnp.repeat(sums / members[:, None], group_size, axis=0)[:rows]
    # A group of zeros stays zero.
    ratio = kernel / jnp.where(scales > 0, scales, 1)
    return jnp.clip(jnp.round(ratio), -1, 1), scales


def round_activations(x: Float[Array, "*batch I"]) -> Float[Array, "*batch I"]:
    """Rounds each row to 255 evenly spaced levels up to its largest absolute value."""
    scale = jnp.abs(x).max(axis=-1, keepdims=True) / _INT8_MAX
    scale = jnp.where(scale > 0, scale, 1)
    return jnp.round(x / scale) * scale


# The backward pass keeps activations and latent weights, which exist anyway, instead of
# rounded copies of both.
@functools.partial(jax.checkpoint, static_argnums=(2, 3))
def _multiply(x: Array, kernel: Array, group_size: int, dtype: DTypeLike) -> Array:
    signs, scales = ternarize(kernel, group_size)
    kernel = _straight_through(kernel, signs * scales)
    x = x.astype(jnp.float32)
    x = _straight_through(x, round_activations(x))
    return jnp.dot(x.astype(dtype), kernel.astype(dtype))


def _straight_through(x: Array, rounded: Array) -> Array:
    """Returns `rounded`, with the derivative of `x`."""
    # The bracket is exactly zero, so it adds no rounding error to `rounded`.
    return jax.lax.stop_gradient(rounded) + (x - jax.lax.stop_gradient(x))
