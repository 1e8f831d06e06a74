"""Work on a few rows of an array at a time, to bound the temporaries of a large one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import keystr
from jax.typing import ArrayLike
from jaxtyping import Array

from nanochat_jax.codecs import is_quantized
from nanochat_jax.transforms.scheduling.barrier import (
    Step,
    after,
    in_turn,
    layouts,
    refilled_after,
)
from nanochat_jax.transforms.sharding import from_bits, to_bits
from nanochat_jax.transforms.state_paths import locate


def by_rows(
    work: Callable[..., Array], x: Array, *others: Array, max_bytes: int
) -> Array:
    """Returns `work(x, *others)`, worked out a few rows at a time and written over `x`.

    So temporaries are as large as a few rows need.

    Args:
      work: Function that treats each row, each entry of the first axis, by itself, and
        keeps shape and type of its first argument.
      x: `[n, *row]`.
      *others: Further arguments, `[n, *row]`.
      max_bytes: Most bytes of the rows at a time, counted in float32.
    """
    rows = rows_at_a_time(x, max_bytes) if x.ndim else 0
    if x.ndim == 0 or rows == len(x):
        return work(x, *others)
    kept = [to_bits(y) for y in others]

    def write(start: Array | int, count: int, bits: Array) -> Array:
        parts = [
            from_bits(lax.dynamic_slice_in_dim(y_bits, start, count), y.dtype)
            for y_bits, y in zip([bits, *kept], [x, *others], strict=True)
        ]
        # A read fused with the write over it would cost a copy of the whole.
        part = work(*lax.optimization_barrier(parts))
        return lax.dynamic_update_slice_in_dim(bits, to_bits(part), start, 0)

    return from_bits(in_pieces(write, len(x), rows, to_bits(x)), x.dtype)


def update_by_rows(
    step_from: Callable[[ArrayLike], Step],
    updates: Any,
    state: Any,
    params: Any,
    max_bytes: int,
    result: Any = None,
) -> tuple[tuple[Any, Any], Any]:
    """Returns `step_from(0)(updates, state, params)`, worked out a few rows at a time.

    Rows are entries of the first axis. They are written over those they came from, so
    that nothing of full size is added to updates and state. The first rows are begun
    after `result` is there.

    Args:
      step_from: Function from the index of the first row that is passed to the `update`
        of a transform that treats each row by itself.
      updates: A tree with one leaf, `[n, *row]`.
      state: Its state; arrays that belong to the leaf have `n` rows too.
      params: A tree like `updates`, or `None`.
      max_bytes: Most bytes of the rows at a time, counted in float32.
      result: Arrays to wait for, if any.

    Returns:
      Updates and state, and `result`.
    """
    [leaf] = jax.tree.leaves(updates)
    rows = rows_at_a_time(leaf, max_bytes) if leaf.ndim > 1 else 0
    whole_step = step_from(0)
    in_place = _keeps_layout(whole_step, updates, state, params)
    if not 0 < rows < leaf.shape[0] or not in_place:
        return in_turn(whole_step, (updates, state, params), result)
    before, treedef = jax.tree.flatten((updates, state, params))
    owned = _owned((updates, state, params), updates)
    written = jax.tree.structure((updates, state))

    def work(start: Array | int, count: int, done: list[Array]) -> list[Array]:
        def step(done: list[Array]) -> tuple[Any, Any]:
            # Counts are from before the first rows: in `done` they have moved on.
            inputs = [
                from_bits(lax.dynamic_slice_in_dim(x, start, count), old.dtype)
                if mine
                else old
                for x, old, mine in zip(
                    [*done, *params_bits], before, owned, strict=True
                )
            ]
            return step_from(start)(*treedef.unflatten(inputs))

        # A read fused with the write over it would cost a copy of the whole leaf.
        part = lax.optimization_barrier(in_turn(step, (done,), done)[0])
        return [
            lax.dynamic_update_slice_in_dim(x, to_bits(new), start, 0) if mine else new
            for x, new, mine in zip(done, jax.tree.leaves(part), owned, strict=False)
        ]

    whole = [to_bits(x) for x in before]
    done, params_bits = whole[: written.num_leaves], whole[written.num_leaves :]
    # A loop that begins with the leaf itself has the state copied where its buffers are
    # given to the updates, as `jax.jit(tx.update, donate_argnums=1)` does.
    done[0] = refilled_after(done[0], (lax.optimization_barrier(done[1:]), result))
    first = 0 if result is None else after(jnp.int32(0), result)
    done = in_pieces(work, leaf.shape[0], rows, done, first)
    new = (from_bits(x, old.dtype) for x, old in zip(done, before, strict=False))
    return written.unflatten(new), result


def in_pieces(
    write: Callable[[Array | int, int, Any], Any],
    size: int,
    rows: int,
    done: Any,
    first: ArrayLike = 0,
) -> Any:
    """Returns `done` after `write(start, count, done)` for each few of `size` rows.

    Args:
      write: Function of the first row of a piece, its number of rows and `done`.
      size: Number of rows.
      rows: Rows of a piece; the last may have fewer.
      done: What is passed from one piece to the next.
      first: The number 0, for pieces to wait for what it is worked out from.
    """
    pieces, rest = divmod(size, rows)
    piece = lambda i, done: write(i * rows, rows, done)
    done = lax.fori_loop(first, pieces, piece, done)
    return write(pieces * rows, rest, done) if rest else done


def rows_at_a_time(x: Array, max_bytes: int, axis: int = 0) -> int:
    """Returns the number of rows to work on at a time: as many as fit.

    Fewer, down to half, if they divide all rows: a rest is compiled apart.

    Args:
      x: The array.
      max_bytes: Most bytes of the rows at a time, counted in float32.
      axis: Axis of which each entry is a row.
    """
    size = x.shape[axis]
    fitting = max(1, max_bytes * size // (4 * max(x.size, 1)))
    if fitting >= size:
        return size
    dividing = max(i for i in range(1, fitting + 1) if size % i == 0)
    return dividing if 2 * dividing >= fitting else fitting


def _keeps_layout(step: Step, updates: Any, state: Any, params: Any) -> bool:
    """Returns whether rows can be written over those they come from."""
    results = jax.eval_shape(step, updates, state, params)[0]
    return layouts(results) == layouts(updates)


def _owned(tree: Any, updates: Any) -> list[bool]:
    """Returns which arrays of a tree belong to the one leaf of the updates."""
    places = locate(tree, updates)
    return [
        places[keystr(path)].name is not None and x.ndim > 0
        for path, node in jax.tree.leaves_with_path(tree, is_leaf=is_quantized)
        for x in jax.tree.leaves(node)
    ]
