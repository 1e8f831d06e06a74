"""Means over microbatches, evaluated one at a time.

Axes: A microbatches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def mean_over(f: Callable[[Any], tuple[Any, Any]], items: Any) -> tuple[Any, Any]:
    """Returns the mean of the first results of `f` over items, and its second ones.

    Means are added up in float32, whatever their type, and have the type of `f`'s.

    Example:
      >>> mean_over(lambda x: (x, 2 * x), jnp.arange(3.0))
      (Array(1., dtype=float32), Array([0., 2., 4.], dtype=float32))

    Args:
      f: Function of one item to a tree that is averaged and one that is kept.
      items: A tree of arrays `[A, ...]`.

    Returns:
      The mean, and what is kept as arrays `[A, ...]`.
    """
    first = jax.tree.map(lambda x: x[0], items)
    number = len(jax.tree.leaves(items)[0])
    if number == 1:
        mean, kept = f(first)
        return mean, jax.tree.map(lambda x: x[None], kept)
    like = jax.eval_shape(f, first)[0]
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, sum_dtype(x)), like)

    def add(total: Any, item: Any) -> tuple[Any, Any]:
        part, kept = f(item)
        plus = lambda total, x: total + x.astype(total.dtype)
        return jax.tree.map(plus, total, part), kept

    total, kept = jax.lax.scan(add, zero, items)
    mean = lambda total, x: (total / number).astype(x.dtype)
    return jax.tree.map(mean, total, like), kept


def sum_dtype(x: Any) -> Any:
    """Returns the type in which arrays like `x` are added up."""
    return jnp.promote_types(x.dtype, jnp.float32)
