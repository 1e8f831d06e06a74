"""A loop over arrays of one shape, a few of which have their turn at a time.

Its body is compiled once, however many arrays there are. To pick arrays, and to write
results over them, is a conditional for each turn, which is compiled to copies alone:
where it is not their turn nothing is done, as the carry of a loop is changed in place.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from nanochat_jax.transforms.scheduling.barrier import after

Row = list[Array]
"""Arrays that have their turn together."""

Work = Callable[[Row, Row, Int32[Array, ""]], tuple[Row, Any]]
"""A function of stacked arrays, of others that are only read, and of the number of the
first in the stacks, to new arrays of the first kind and what is the same for all."""


def in_turns(
    work: Work,
    written: Sequence[Row],
    read: Sequence[Row],
    common: Any,
    together: int,
    result: Any = None,
) -> tuple[list[Row], Any]:
    """Returns arrays after `work`, a few rows of them at a time, and what it adds.

    Args:
      work: Function of stacks `[together, ...]` of the arrays of as many rows.
      written: Rows of arrays of the same shapes, which results are written over.
      read: As many rows of further arrays.
      common: Arrays like those that are the same for all; the last turn's are returned.
      together: Number of rows that have their turn together, which divides all.
      result: Arrays to wait for, if any.
    """
    turns, count = len(written) // together, len(written[0])
    # Of the number of a turn, as a loop that starts at it cannot be differentiated.
    zero = jnp.int32(0) if result is None else after(jnp.int32(0), result)
    fixed = _by_turn(read, together)

    def turn(i: Array, carry: tuple[list[Row], Any]) -> tuple[list[Row], Any]:
        rows = _by_turn(carry[0], together)
        now = jnp.asarray(i, jnp.int32) + zero  # a number under `jax.disable_jit`
        hits = [now == j for j in range(turns)]
        picked = [jax.lax.switch(now, _choices(x)) for x in (rows, fixed)]
        arrays = [jnp.stack(x) for part in picked for x in zip(*part, strict=True)]
        new, beside = work(arrays[:count], arrays[count:], now * together)
        mine = [[x[j] for x in new] for j in range(together)]
        done = [_if(hit, mine, old) for hit, old in zip(hits, rows, strict=True)]
        return [row for part in done for row in part], beside

    return jax.lax.fori_loop(0, turns, turn, (_begun_after(written), common))


def _by_turn(rows: Sequence[Row], together: int) -> list[list[Row]]:
    return [[*rows[i : i + together]] for i in range(0, len(rows), together)]


def _choices(turns: Sequence[list[Row]]) -> list[Callable[[], list[Row]]]:
    return [lambda rows=rows: rows for rows in turns]


def _if(hit: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Returns `new` if it is hit, copied over `old`."""
    return jax.lax.cond(hit, lambda: new, lambda: old)


def _begun_after(rows: Sequence[Row]) -> list[Row]:
    """Returns rows whose first arrays wait until those like them have been read.

    Where `jax.jit(tx.update, donate_argnums=1)` gives the buffers of a momentum to the
    updates, they are filled only then, or the momentum would be copied.
    """
    kind = lambda x: (x.shape, x.dtype)
    likes = [[x for x in row[1:] if kind(x) == kind(row[0])] for row in rows]
    if not jax.tree.leaves(likes):
        return [*rows]
    zero = after(jnp.int32(0), jax.lax.optimization_barrier(likes))
    # A loop, which never runs, or the sum would be compiled into each of the copies.
    zero = jax.lax.while_loop(lambda x: x > 0, lambda x: x - 1, zero)
    keep = lambda x: jnp.where(zero == 0, x, jnp.zeros_like(x))
    return [[keep(row[0]), *row[1:]] for row in rows]
