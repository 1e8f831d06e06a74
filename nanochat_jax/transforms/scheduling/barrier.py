"""Keep a compiler from starting one piece of work before another has ended."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nanochat_jax.transforms.sharding import varying_axes

Step = Callable[[Any, Any, Any], tuple[Any, Any]]
"""An `update` of a transform: updates, state and params to updates and state."""

_BARRIER_HOLDS = jax.__version_info__ >= (0, 11)


def in_turn(
    step: Step, inputs: Any, result: Any = None, devices: int = 1
) -> tuple[Any, Any]:
    """Returns `step(*inputs)`, worked on after `result` is there, and `result`.

    Before JAX 0.11 the order is kept by a loop, which reverse-mode differentiation does
    not pass. On several devices the compiler decides it there, so that collectives
    stay out of loops.

    Args:
      step: Work to do.
      inputs: Updates, state and params, complete before any of the work is begun.
      result: Arrays to wait for, if any.
      devices: Number of devices that the inputs are on.
    """
    if _BARRIER_HOLDS or devices > 1 or varying_axes(inputs):
        inputs, result = jax.lax.optimization_barrier((inputs, result))
        return step(*inputs), result
    # Compilers before JAX 0.11 drop the barrier before they schedule. A loop they keep;
    # its trip count, 1, depends on the result, so that it is not unrolled.
    updates, state, params = inputs
    step = jax.jit(step)  # traced once, for the shapes of its results and for the loop
    first = jax.tree.leaves((updates, ()) if result is None else result)
    seen = sum(x.ravel()[0].astype(jnp.float32) for x in first if x.size)
    times = jnp.where(seen > jnp.inf, 0, 1)
    # Results are written over the inputs, unless `step` changes shape or type.
    results = jax.eval_shape(step, *inputs)[0]
    in_place = layouts(results) == layouts(updates)
    start = updates if in_place else optax.tree.zeros_like(results)
    take = lambda carried: carried if in_place else updates
    _, *new = jax.lax.while_loop(
        lambda carry: carry[0] < times,
        lambda carry: (carry[0] + 1, *step(take(carry[1]), carry[2], params)),
        (0, start, state),
    )
    return tuple(new), result


def layouts(tree: Any) -> list[tuple[tuple[int, ...], Any]]:
    """Returns shapes and types of the leaves of a tree.

    A list, and not a tree, as there are nodes that compare entry by entry.
    """
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
