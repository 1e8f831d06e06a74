"""Keep a compiler from starting one piece of work before another has ended."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from nanochat_jax.transforms.sharding import from_bits, to_bits, varying_axes

Step = Callable[[Any, Any, Any], tuple[Any, Any]]
"""An `update` of a transform: updates, state and params to updates and state."""

_BARRIER_HOLDS = jax.__version_info__ >= (0, 11)


def in_turn(
    step: Callable[..., Any], inputs: Any, result: Any = None, devices: int = 1
) -> tuple[Any, Any]:
    """Returns `step(*inputs)`, begun once `result` is there, and `result`.

    On several devices the compiler decides the order before JAX 0.11, so that
    collectives stay out of conditionals.

    Args:
      step: Work to do.
      inputs: Its arguments.
      result: Arrays to wait for, if any.
      devices: Number of devices that the inputs are on.
    """
    if result is None:
        return step(*inputs), result
    if _BARRIER_HOLDS or devices > 1 or varying_axes(inputs):
        inputs, result = jax.lax.optimization_barrier((inputs, result))
        return step(*inputs), result
    # Compilers before JAX 0.11 drop the barrier before they schedule. A conditional is
    # kept, since its predicate depends on the result. A loop would carry the state in
    # place, which copies it where its buffers are given to the updates, as
    # `jax.jit(tx.update, donate_argnums=1)` does.
    ready = _zero_after(result) == 0
    step = jax.jit(step)  # traced once, for the shapes of its results and as a branch
    nothing = optax.tree.zeros_like(jax.eval_shape(step, *inputs))
    return jax.lax.cond(ready, step, lambda *_: nothing, *inputs), result


def run_after(f: Callable[..., Any], *args: Any, result: Any) -> Any:
    """Returns `f(*args)`, none of which is begun before `result` is there.

    Otherwise a compiler may prepare arguments long before, such as a table in float32.

    Args:
      f: Function of arrays.
      *args: Its arguments.
      result: Arrays to wait for.
    """
    if _BARRIER_HOLDS or varying_axes(args):
        return f(*jax.lax.optimization_barrier((args, result))[0])
    zero = _zero_after(result)
    like = jax.eval_shape(f, *args)
    # As bits, or short results would be copied to and from the carry.
    bits_of = lambda *args: jax.tree.map(to_bits, f(*args))
    start = jax.tree.map(
        lambda x: jnp.full(x.shape, zero, x.dtype), jax.eval_shape(bits_of, *args)
    )

    def once(_: Array, carry: Any) -> Any:
        args, _ = jax.lax.optimization_barrier(carry)
        return args, bits_of(*args)

    _, bits = jax.lax.fori_loop(0, 1 - zero, once, (args, start))
    return jax.tree.map(lambda bits, x: from_bits(bits, x.dtype), bits, like)


def after(index: Array, result: Any) -> Array:
    """Returns an integer that is known only after some work is done.

    It is worked out from the result. Of a constant behind a barrier, compilers made
    arrays of zeros long before the barrier.

    Args:
      index: The integer, such as the first index of a loop.
      result: Arrays to wait for.
    """
    if varying_axes(result):
        return jax.lax.optimization_barrier((index, result))[0]
    return index + _zero_after(result)


def refilled_after(x: Array, result: Any) -> Array:
    """Returns the entries of `x` in a buffer that is filled once some work is done.

    The buffer may be one that the work has read.

    Args:
      x: An array.
      result: Arrays to wait for.
    """
    return jnp.where(_zero_after(result) == 0, x, jnp.zeros_like(x))


def _zero_after(result: Any) -> Array:
    """Returns the integer 0, worked out from entries of arrays."""
    numbers = (
        x for x in jax.tree.leaves(result) if jnp.issubdtype(x.dtype, jnp.number)
    )
    first = (x[(0,) * x.ndim] for x in numbers if x.size)
    return jnp.where(sum(x.astype(jnp.float32) for x in first) > jnp.inf, 1, 0)


def layouts(tree: Any) -> list[tuple[tuple[int, ...], Any]]:
    """Returns shapes and types of the leaves of a tree.

    A list, and not a tree, as there are nodes that compare entry by entry.
    """
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
