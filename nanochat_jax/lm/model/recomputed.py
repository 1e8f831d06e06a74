"""Factors of matrix products that the backward pass works out again.

Differentiation keeps both factors of a product until its gradient is known. A factor
that takes few operations to make, such as a normalised residual stream or the gated
features of SwiGLU, is made again then, and what it was made of is kept in its place,
which a product before it keeps anyway. Half of the memory of a step of many tokens is
saved, and no time lost: docs/RESULTS.md, "A training step".

Axes: B batch, S sequence, I input, O output features.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanochat_jax.lm.model import activation_sharding
from nanochat_jax.transforms import after, run_after


class Recomputed(NamedTuple):
    """An array that is made of others, again where its gradient is needed.

    Attributes:
      of: Function to the array.
      inputs: Its arguments, pytrees of arrays.
    """

    of: Callable[..., Array]
    inputs: tuple[Any, ...]

    @property
    def value(self) -> Array:
        """The array."""
        return self.of(*self.inputs)

    def then(self, f: Callable[[Array], Array]) -> "Recomputed":
        """Returns `f` of the array.

        Args:
          f: Function of few operations.
        """
        return Recomputed(lambda *inputs: f(self.of(*inputs)), self.inputs)


def as_recomputed(x: Array | Recomputed) -> Recomputed:
    """Returns an array as one that is kept itself.

    Args:
      x: An array, or one that is returned as it is.
    """
    return x if isinstance(x, Recomputed) else Recomputed(_same, (x,))


def multiply(
    x: Float[Array, "B S I"] | Recomputed, kernels: Sequence[Float[Array, "I O"]]
) -> list[Float[Array, "B S O"]]:
    """Returns the product of `x` with each kernel, all positions in one product.

    Example:
      >>> x = Recomputed(jnp.cos, (jnp.zeros((1, 2, 3)),))
      >>> multiply(x, [jnp.ones((3, 4))])[0].shape
      (1, 2, 4)

    Args:
      x: The other factor; products are computed in the type of the kernels.
      kernels: Kernels of one type.
    """
    dtype = kernels[0].dtype
    of, inputs = as_recomputed(x).then(lambda x: x.astype(dtype))
    return list(_multiply(of, inputs, tuple(kernels)))


def held_back(tree: Any, result: Any, *, on_meshes: bool = False) -> Any:
    """Returns arrays that are there only once a result is.

    What is made of them cannot be taken from before, where a compiler found the same.

    Args:
      tree: The arrays.
      result: Arrays to wait for.
      on_meshes: Whether to wait on a mesh too, whose devices then send an entry of the
        result to each other. Else they have a barrier, which some compilers drop.
    """
    if activation_sharding.is_used() and not on_meshes:
        return jax.lax.optimization_barrier((tree, result))[0]
    zero = after(jnp.int32(0), result)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(
    of: Callable[..., Array], inputs: tuple[Any, ...], kernels: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Returns `of(*inputs) @ kernel` of each, without transposed copies in gradients.

    Processors multiply in float32. Of bfloat16 kernels they would make all float32
    copies of a block before it starts, and keep them and all gradients to its end: each
    product here waits for its input, and the next for it.
    """
    x = of(*inputs)
    rows = x.reshape(-1, x.shape[-1])
    products = (jax.lax.dot(rows, _after(kernel, rows)) for kernel in kernels)
    return tuple(y.reshape(*x.shape[:-1], -1) for y in products)


def _forward(
    of: Callable[..., Array], inputs: tuple[Any, ...], kernels: tuple[Array, ...]
) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
    return _multiply(of, inputs, kernels), (inputs, kernels)


def _backward(
    of: Callable[..., Array], kept: tuple[Any, ...], grads: tuple[Array, ...]
) -> tuple[tuple[Any, ...], tuple[Array, ...]]:
    inputs, kernels = kept
    x, d_inputs = jax.vjp(of, *held_back(inputs, grads))
    rows = x.reshape(-1, x.shape[-1])
    d_rows, d_kernels = jnp.zeros_like(rows), []
    for kernel, g in zip(kernels, grads, strict=True):
        g = g.reshape(-1, g.shape[-1])
        d_kernel_of = lambda x, g, y=kernel: _dot(x, g, 0).astype(y.dtype)
        if kernel.dtype != jnp.bfloat16:
            d_rows += _dot(g, kernel, 1).astype(x.dtype)
            d_kernels.append(d_kernel_of(rows, g))
            continue
        g = held_back(g, d_rows, on_meshes=True)
        d_kernel = run_after(d_kernel_of, rows, g, result=g)
        d_kernels.append(d_kernel)
        d_rows += _dot(g, _after(kernel, d_kernel), 1).astype(x.dtype)
    return d_inputs(d_rows.reshape(x.shape)), tuple(d_kernels)


_multiply.defvjp(_forward, _backward)


def _dot(x: Array, y: Array, axis: int) -> Array:
    return jax.lax.dot_general(x, y, (((axis,), (axis,)), ((), ())))


def _after(kernel: Array, x: Array) -> Array:
    """Returns a kernel, which if short is there only when `x` is."""
    short = kernel.dtype == jnp.bfloat16
    return held_back(kernel, x, on_meshes=True) if short else kernel


def _same(x: Array) -> Array:
    return x
