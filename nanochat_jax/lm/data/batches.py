"""Batches: windows of a token array, as a pure function of seed and step.

No state is kept between steps, so a run resumes from its step number alone. A window
has T + 1 tokens, since the target of each position is the next token; windows start T
tokens apart, so that each token is predicted once per epoch.

Axes: A microbatches of a step, B sequences of a microbatch, T = `seq_len` predicted
tokens of a sequence.
"""

from collections.abc import Generator

import grain
import numpy as np

from nanochat_jax.config import schema
from nanochat_jax.lm.data.joined import Tokens, read_windows


class Batches:
    """Endless windows, shuffled anew in each epoch.

    `batches(step)` is the batch of that step, int32 `[A, B, T + 1]`, or `[B, T + 1]`
    without `microbatches`. Batches continue across the end of an epoch, so none is
    short.

    Attributes:
      steps_per_epoch: Steps after which every window was seen, rounded up.

    Args:
      tokens: Ids, `[length]`; memory-mapped ones are read window by window.
      batch_size: Sequences of a microbatch, B.
      seq_len: Tokens of a sequence, T.
      seed: Seed of the order, from 0 to 2**32 - 1.
      microbatches: Microbatches of a step, A; `None` for batches without that axis.
      rows: Which of the B sequences to read, for one of several processes; all if not
        given.

    Raises:
      ValueError: If there is no window, or a number is out of range.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        microbatches: int | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        schema.require(
            (batch_size >= 1, f"`batch_size` must be at least 1, got {batch_size}."),
            (0 <= seed < 2**32, f"`seed` must be from 0 to 2**32 - 1, got {seed}."),
        )
        windows = _Windows(tokens, seq_len)
        count = batch_size * (microbatches or 1)
        shape = (batch_size,) if microbatches is None else (microbatches, batch_size)
        self.steps_per_epoch = -(-len(windows) // count)
        chosen = slice(None) if rows is None else rows
        order = grain.MapDataset.range(len(windows)).seed(seed).shuffle().repeat()
        # Gathering all windows of a step at once is several times faster than one by
        # one. An endless order has no remainder, and grain's length would overflow.
        self._dataset = order.batch(count, drop_remainder=True).map(
            lambda step: windows[step.reshape(shape)[..., chosen]].astype(np.int32)
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
    tokens: Tokens, *, batch_size: int, seq_len: int, limit: int | None = None
) -> list[np.ndarray]:
    """Returns the windows of an evaluation: always the same ones, in order.

    Args:
      tokens: Ids, `[length]`.
      batch_size: Sequences of a batch, B. Windows that do not fill a batch are left
        out, but if there are fewer than B, all make one smaller batch.
      seq_len: Tokens of a sequence, T.
      limit: Most batches to return, of windows evenly spaced over `tokens`; `None` for
        all.

    Returns:
      Batches, each int32 `[B, T + 1]`.

    Raises:
      ValueError: If there is no window, or a number is below 1.
    """
    schema.require(
        (batch_size >= 1, f"`batch_size` must be at least 1, got {batch_size}."),
        (limit is None or limit >= 1, f"`limit` must be at least 1, got {limit}."),
    )
    windows = _Windows(tokens, seq_len)
    size = min(batch_size, len(windows))
    count = len(windows) // size if limit is None else min(limit, len(windows) // size)
    indices = np.arange(count * size) * len(windows) // (count * size)
    return [windows[row].astype(np.int32) for row in indices.reshape(count, size)]


class _Windows:
    """Windows of T + 1 ids; an array of indices gives as many, `[*indices, T + 1]`."""

    def __init__(self, tokens: Tokens, seq_len: int):
        schema.require(
            (seq_len >= 1, f"`seq_len` must be at least 1, got {seq_len}."),
            (
                len(tokens) > seq_len,
                f"a window takes `seq_len` + 1 = {seq_len + 1} tokens, but there are "
                f"only {len(tokens)}. Give more text or a shorter seq_len.",
            ),
        )
        self._tokens, self._seq_len = tokens, seq_len

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._seq_len

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        return read_windows(self._tokens, indices * self._seq_len, self._seq_len + 1)
