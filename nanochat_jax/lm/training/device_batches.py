"""Batches of a run, on the devices that are to work on them."""

import contextlib
from collections.abc import Generator

import numpy as np
from jaxtyping import Array, Int32

from nanochat_jax.lm.data import eval_batches
from nanochat_jax.lm.model import activation_sharding
from nanochat_jax.lm.training.run import Run, train_batches


def feed(
    run: Run, start: int, stop: int
) -> Generator[tuple[int, Int32[Array | np.ndarray, "A B S+1"]], None, None]:
    """Yields steps and their batches, reading ahead in a thread.

    On a mesh each process reads the sequences of its own devices only, and the batches
    are arrays on all of them. Close the generator, or run it to its end, to stop the
    thread.

    Args:
      run: The run.
      start: First step.
      stop: Step after the last.

    Yields:
      A step and its batch.
    """
    count = run.config.batch_size
    batches = train_batches(run.config, run.corpus, _own_rows(run, count))
    with contextlib.closing(batches.prefetch(start, stop)) as reading:
        for step, own in reading:
            yield step, _put(run, own, count)


def feed_evaluation(run: Run) -> list[Int32[Array | np.ndarray, "B S+1"]]:
    """Returns the batches that a run is evaluated on."""
    config = run.config
    batches = eval_batches(
        run.corpus.val,
        batch_size=config.batch_size,
        seq_len=config.sequence,
        limit=config.eval_batches,
    )
    count = len(batches[0])
    rows = _own_rows(run, count)
    own = batches if rows is None else [batch[rows] for batch in batches]
    return [_put(run, batch, count) for batch in own]


def _own_rows(run: Run, count: int) -> np.ndarray | None:
    """Returns which of `count` sequences this process reads; `None` for all."""
    return run.mesh and activation_sharding.own_rows(run.mesh, count)


def _put(run: Run, own: np.ndarray, count: int) -> Array | np.ndarray:
    return (
        own if run.mesh is None else activation_sharding.put_batch(run.mesh, own, count)
    )
