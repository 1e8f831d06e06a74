"""A loop over arrays of one shape, a few of which have their turn at a time.

Its body is compiled once, however many arrays there are. To pick arrays, and to write
results over them, is a loop of one iteration or none for each turn: that is compiled to
copies alone, and a compiler changes the carry of a loop in place, where it copies what
a conditional gives back.
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
        now = i.astype(jnp.int32) + zero
        hits = [now == j for j in range(turns)]
        picked = zip(_picked(hits, rows), _picked(hits, fixed), strict=True)
        stacks = map(jnp.stack, zip(*([*a, *b] for a, b in picked), strict=True))
        arrays = [*stacks]
        new, beside = work(arrays[:count], arrays[count:], now * together)
        mine = [[x[j] for x in new] for j in range(together)]
        done = [_if(hit, mine, old) for hit, old in zip(hits, rows, strict=True)]
        return [row for part in done for row in part], beside

    return jax.lax.fori_loop(0, turns, turn, (_begun_after(written), common))


def _by_turn(rows: Sequence[Row], together: int) -> list[list[Row]]:
    return [[*rows[i : i + together]] for i in range(0, len(rows), together)]


def _picked(hits: Sequence[Bool[Array, ""]], turns: Sequence[list[Row]]) -> list[Row]:
    """Returns the rows of the turn that has come."""
    found = jax.tree.map(jnp.zeros_like, turns[0])
    for hit, rows in zip(hits, turns, strict=True):
        found = _if(hit, rows, found)
    return found


@jax.custom_jvp
def _if(hit: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Returns `new` if it is hit, copied over `old`."""
    once = lambda carry: (jnp.zeros_like(hit), new)
    return jax.lax.while_loop(lambda carry: carry[0], once, (hit, old))[1]


@_if.defjvp
def _jvp_of_if(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """Differentiates `_if`, whose loop cannot be gone through backwards."""
    hit = primals[0]
    select = lambda new, old: (
        new if new.dtype == jax.dtypes.float0 else jnp.where(hit, new, old)
    )
    return _if(*primals), jax.tree.map(select, *tangents[1:])


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
