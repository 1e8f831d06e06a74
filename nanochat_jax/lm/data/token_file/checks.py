"""Checks of ids: whether they are in the vocabulary, and of the width they are read as.

Ids without a header may be of another width than is said. Read too narrow, 64-bit ids
are the id and 0 in turn, which are all in the vocabulary; read too wide or in the other
byte order, most are far outside.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nanochat_jax.config import schema

CHECK_CHUNK = 1 << 22
# Of 16-bit halves of an id below 262,144 the upper one is below 4.
_UPPER_HALF = 4
_FEWEST_PAIRS = 32
_READINGS = ("<u2", "<u4", "<i8", ">u2", ">u4", ">i8")
_BY_HAND = (
    "If the ids are right as they are read, set both `token_format` and `token_dtype`."
)


def check_ids(
    tokens: np.ndarray,
    vocab_size: int,
    source: str,
    advice: Callable[[], str] = lambda: "",
) -> None:
    """Checks that ids are below `vocab_size`, a chunk at a time.

    On the device an id that is too large goes unnoticed: a look-up clamps it.

    Args:
      tokens: Ids, `[length]`, of an integer type.
      vocab_size: Smallest invalid id.
      source: Name of the ids, for the message.
      advice: Returns what else may be wrong, for the message.

    Raises:
      ValueError: If an id is negative or too large; the message names the first.
    """
    for start in range(0, len(tokens), CHECK_CHUNK):
        chunk = tokens[start : start + CHECK_CHUNK]
        if chunk.max() >= vocab_size or chunk.min() < 0:
            at = int(np.argmax((chunk >= vocab_size) | (chunk < 0)))
            raise ValueError(
                f"{source}: token {start + at} has the id {chunk[at]}, but ids go from "
                f"0 to {vocab_size - 1}. Set `vocab_size` to that of the tokenizer"
                f"{advice()}."
            )


def check_raw_ids(tokens: np.ndarray, vocab_size: int, path: Path) -> None:
    """Checks ids whose type the file does not tell, and the type with them.

    Args:
      tokens: Ids, `[length]`, without a header before them.
      vocab_size: Smallest invalid id.
      path: Their file.

    Raises:
      ValueError: If an id is not in the vocabulary, or they look as if they were of
        another width or byte order.
    """
    other = functools.partial(_likelier_reading, path, vocab_size, tokens.dtype)
    check_ids(tokens, vocab_size, str(path), lambda: _advice(other()))
    sample = tokens[:CHECK_CHUNK]
    schema.require(
        (
            not _reads_too_narrow(sample),
            f"{path}: read as {tokens.dtype.name}, every other id is below "
            f"{_UPPER_HALF}, as if the ids had more bits{_advice(other())}. {_BY_HAND}",
        ),
        (
            tokens.dtype.itemsize != 2 or not _reads_swapped(sample),
            f"{path}: read as {tokens.dtype.name}, the ids look big-endian. Write them "
            f'with `ids.astype("<u2").tofile(path)`. {_BY_HAND}',
        ),
        (
            tokens.dtype.itemsize != 1 or vocab_size <= 256,
            f"{path}: uint8 holds ids below 256, but `vocab_size` is {vocab_size}, so "
            f"that any bytes read as ids. Set `vocab_size` to at most 256. {_BY_HAND}",
        ),
    )


def _advice(reading: str | None) -> str:
    """Returns in words that ids read otherwise would fit."""
    if reading is None:
        return ""
    name = np.dtype(reading).name
    if reading.startswith(">"):
        return (
            f". Read as big-endian {name} all are in the vocabulary: if they are, "
            f'write them with `ids.astype("<{reading[1:]}").tofile(path)`'
        )
    return (
        f". Read as {name} all are in the vocabulary: set `token_dtype` to "
        f'"{name}" if they are'
    )


def _likelier_reading(path: Path, vocab_size: int, dtype: np.dtype) -> str | None:
    """Returns the type of which the first ids are in the vocabulary and smallest."""
    size, found = path.stat().st_size, {}
    for reading in _READINGS:
        other = np.dtype(reading)
        # Where every number of a type is an id, that says nothing.
        telling = vocab_size <= np.iinfo(other).max
        if other == dtype or size % other.itemsize or not telling:
            continue
        sample = np.fromfile(path, other, CHECK_CHUNK)
        fits = sample.max() < vocab_size and sample.min() >= 0
        if fits and not _reads_too_narrow(sample):
            found[reading] = np.median(sample)
    return min(found, key=found.__getitem__, default=None)


def _reads_too_narrow(sample: np.ndarray) -> bool:
    """Tells whether every other id is near zero, and the ids between them are not."""
    small = sample < _UPPER_HALF
    even, odd = small[::2], small[1::2]
    if len(odd) < _FEWEST_PAIRS:
        return False
    low, high = sorted((even.mean(), odd.mean()))
    return bool(high == 1 and low < 0.9)


def _reads_swapped(sample: np.ndarray) -> bool:
    """Tells whether ids are far smaller, as frequent ids are, with bytes swapped."""
    if len(np.unique(sample)) < _FEWEST_PAIRS:
        return False
    return bool(np.median(sample.byteswap()) * 8 < np.median(sample))
