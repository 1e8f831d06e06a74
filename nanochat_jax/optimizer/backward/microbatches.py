"""Means over microbatches, evaluated one at a time, and sums.

Axes: A microbatches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nanochat_jax.transforms import after, by_rows, group_bytes


def mean_over(
    f: Callable[[Any, Any], tuple[Any, Any]], fixed: Any, items: Any
) -> tuple[Any, Any]:
    """Returns the mean of the first results of `f` over items, and its second ones.

    Means are added up in float32, whatever their type, and have the type of `f`'s.

    Example:
      >>> mean_over(lambda a, x: (a * x, x), 2.0, jnp.arange(3.0))
      (Array(2., dtype=float32), Array([0., 1., 2.], dtype=float32))

    Args:
      f: Function of `fixed` and one item to a tree that is averaged and one that is
        kept.
      fixed: A tree of arrays, such as parameters.
      items: A tree of arrays `[A, ...]`.

    Returns:
      The mean, and what is kept as arrays `[A, ...]`.
    """
    first = jax.tree.map(lambda x: x[0], items)
    number = len(jax.tree.leaves(items)[0])
    if number == 1:
        mean, kept = f(fixed, first)
        return mean, jax.tree.map(lambda x: x[None], kept)
    like = jax.eval_shape(f, fixed, first)[0]
    # There when items are, and not laid out long before.
    zero = after(jnp.int32(0), items)
    zeros = jax.tree.map(lambda x: jnp.full(x.shape, zero, sum_dtype(x)), like)

    def add(carry: Any, item: Any) -> tuple[Any, Any]:
        # Carried on behind a barrier, or processors would widen short ones beforehand.
        fixed, total = jax.lax.optimization_barrier(carry)
        part, kept = f(fixed, item)
        sum_up = lambda total, x: total + x.astype(total.dtype)
        return (fixed, jax.tree.map(sum_up, total, part)), kept

    (_, total), kept = jax.lax.scan(add, (fixed, zeros), items)
    mean = lambda total, x: (total / number).astype(x.dtype)
    return jax.tree.map(mean, total, like), kept


def plus(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns `x + y`, written over `x` if it is of a short type.

    A few rows at a time, or a processor would keep the sum of two tables beside both.
    On a mesh in use, which may divide rows, it is left to the compiler.

    Args:
      x: An array that nothing else reads.
      y: An array of its shape and type.
    """
    if sum_dtype(x) == x.dtype or not jax.sharding.get_abstract_mesh().empty:
        return x + y
    return by_rows(jnp.add, x, y, max_bytes=group_bytes())


def sum_dtype(x: Any) -> Any:
    """Returns the type in which arrays like `x` are added up."""
    return jnp.promote_types(x.dtype, jnp.float32)
