"""Several arrays of token ids as one, without a copy of them."""

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


class JoinedTokens:
    """Arrays of ids, one after another, read like one array.

    A slice is again of this kind, and `np.asarray` reads it into memory. Windows may
    span two arrays or more, so that it makes no difference how ids are divided.

    Example:
      >>> joined = JoinedTokens([np.arange(3), np.arange(3, 5)])
      >>> len(joined), np.asarray(joined[1:4]).tolist()
      (5, [1, 2, 3])

    Args:
      parts: Arrays of one type, `[length]` each; memory-mapped ones stay on disk.
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, chosen: slice) -> "JoinedTokens":
        start, stop, step = chosen.indices(len(self))
        if step != 1:
            raise ValueError(f"a slice of joined tokens has step 1, got {step}.")
        starts = self._ends - [len(part) for part in self._parts]
        return JoinedTokens(
            [
                part[max(start - begin, 0) : max(stop - begin, 0)]
                for part, begin in zip(self._parts, starts.tolist(), strict=True)
            ]
        )

    def __array__(
        self, dtype: np.dtype | None = None, copy: bool | None = None
    ) -> np.ndarray:
        if copy is False:
            raise ValueError("joined tokens become an array only as a copy.")
        return np.concatenate(self._parts).astype(dtype or self.dtype, copy=False)

    def windows(self, starts: np.ndarray, size: int) -> np.ndarray:
        """Returns windows of ids, `[*starts.shape, size]`.

        Args:
          starts: Index of the first id of each window.
          size: Ids of a window.
        """
        flat = starts.reshape(-1)
        found = np.empty((len(flat), size), self.dtype)
        first, last = (
            np.searchsorted(self._ends, at, side="right")
            for at in (flat, flat + size - 1)
        )
        for index in np.unique(first[first == last]):
            rows = np.flatnonzero((first == index) & (last == index))
            part = self._parts[index]
            begin = self._ends[index] - len(part)
            found[rows] = sliding_window_view(part, size)[flat[rows] - begin]
        for row in np.flatnonzero(first != last):
            found[row] = self[flat[row] : flat[row] + size]
        return found.reshape(*starts.shape, size)


Tokens = np.ndarray | JoinedTokens
"""Ids, `[length]`, of one array or of several."""


def read_windows(tokens: Tokens, starts: np.ndarray, size: int) -> np.ndarray:
    """Returns windows of ids, `[*starts.shape, size]`.

    Args:
      tokens: Ids.
      starts: Index of the first id of each window.
      size: Ids of a window.
    """
    if isinstance(tokens, JoinedTokens):
        return tokens.windows(starts, size)
    return sliding_window_view(tokens, size)[starts]
