"""Batches: windows of a token array, as a pure function of seed and step.

Nothing is kept between steps, so a run resumes from its step number alone. Axes: B
sequences of a batch, T = `seq_len` tokens that are predicted. A window has T + 1
tokens, since each position's target is the next one; windows lie T apart, so that each
token is predicted once an epoch.
"""

from collections.abc import Generator

import grain
import numpy as np

from nanochat_jax.config import schema


class Batches:
    """Shuffled windows without end, anew shuffled each epoch.

    `batches(step)` is the batch of that step, int32 `[B, T + 1]`. Batches run on across
    the end of an epoch, so none is short.

    Attributes:
      steps_per_epoch: Steps after which every window was seen, rounded up.

    Args:
      tokens: Ids, `[length]`; a memory-mapped array is read window by window.
      batch_size: Sequences of a batch, B.
      seq_len: Tokens of a sequence, T.
      seed: Seed of the order, from 0 to 2**32 - 1.
      rows: Which sequences of each batch to read, for one of several processes that
        share it; all if not given.

    Raises:
      ValueError: If there is no window, or a number is out of range.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        rows: np.ndarray | None = None,
    ) -> None:
        schema.require(
            (batch_size >= 1, f"`batch_size` must be at least 1, got {batch_size}."),
            (0 <= seed < 2**32, f"`seed` must be from 0 to 2**32 - 1, got {seed}."),
        )
        windows = _windows(tokens, seq_len)
        self.steps_per_epoch = -(-len(windows) // batch_size)
        chosen = slice(None) if rows is None else rows
        order = grain.MapDataset.range(len(windows)).seed(seed).shuffle().repeat()
        # Whole batches are gathered at once: several times faster than one by one.
        # Without end there is no remainder; grain would count with it past 2**63.
        self._dataset = order.batch(batch_size, drop_remainder=True).map(
            lambda indices: windows[indices[chosen]].astype(np.int32)
        )

    def __call__(self, step: int) -> np.ndarray:
        """Returns the batch of `step`, counted from 0."""
        return self._dataset[step]  # pyright: ignore[reportReturnType]

    def prefetch(
        self, start: int, stop: int
    ) -> Generator[tuple[int, np.ndarray], None, None]:
        """Yields steps and their batches, reading ahead in a thread.

        Close the generator, or run it to its end, to stop the thread.

        Args:
          start: First step.
          stop: Step after the last.

        Yields:
          A step and its batch.
        """
        reader = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        iterator = iter(self._dataset[start:stop].to_iter_dataset(reader))
        try:
            yield from enumerate(iterator, start)
        finally:
            iterator.close()


def eval_batches(
    tokens: np.ndarray, *, batch_size: int, seq_len: int, limit: int | None = None
) -> list[np.ndarray]:
    """Returns the windows to evaluate on: the same ones each time, in order.

    Args:
      tokens: Ids, `[length]`.
      batch_size: Sequences of a batch, B. The rest that fills no batch is left out,
        but if there are fewer windows than this, all make one smaller batch.
      seq_len: Tokens of a sequence, T.
      limit: Most batches to return, their windows spread evenly over `tokens`; None
        for all.

    Returns:
      Batches, each int32 `[B, T + 1]`.

    Raises:
      ValueError: If there is no window, or a number is below 1.
    """
    schema.require(
        (batch_size >= 1, f"`batch_size` must be at least 1, got {batch_size}."),
        (limit is None or limit >= 1, f"`limit` must be at least 1, got {limit}."),
    )
    windows = _windows(tokens, seq_len)
    size = min(batch_size, len(windows))
    count = len(windows) // size if limit is None else min(limit, len(windows) // size)
    indices = np.arange(count * size) * len(windows) // (count * size)
    return [windows[row].astype(np.int32) for row in indices.reshape(count, size)]


def _windows(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """Returns a view of the windows, `[windows, T + 1]`."""
    schema.require(
        (seq_len >= 1, f"`seq_len` must be at least 1, got {seq_len}."),
        (
            len(tokens) > seq_len,
            f"a window takes `seq_len` + 1 = {seq_len + 1} tokens, but there are only "
            f"{len(tokens)}. Give more text or a shorter seq_len.",
        ),
    )
    return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]
