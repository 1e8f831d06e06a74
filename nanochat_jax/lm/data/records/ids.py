"""Records as token ids: encoded one by one, so that memory is that of the ids."""

import array
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanochat_jax.lm.data.documents import HELD_OUT
from nanochat_jax.lm.data.paths import find_files
from nanochat_jax.lm.data.records.chat import Chat
from nanochat_jax.lm.data.records.rows import READERS, SUFFIXES, Problems
from nanochat_jax.lm.data.tokenizer import Tokenizer

_WANTED = {
    None: "a text or a list of messages",
    str: "a text, as the records before are",
    list: "a list of messages, as the records before are",
}


class Encoded(NamedTuple):
    """Ids of records, those held out apart.

    Attributes:
      train: Ids to train on, `[length]`; negative ones are read but not predicted.
      val: Held-out ids.
      val_bytes: Bytes of held-out text that is predicted; an end counts as one.
      records: Number of records.
      files: Number of files.
    """

    train: np.ndarray
    val: np.ndarray
    val_bytes: int
    records: int
    files: int


def encode(
    name: str, paths: Sequence[str | Path], field: str, tokenizer: Tokenizer
) -> Encoded:
    """Reads records and returns their ids.

    Texts are documents, lists of messages are conversations. A twentieth of the
    distinct records, at least one, is held out, by the hash of their contents.

    Args:
      name: Data set, `jsonl` or `parquet`.
      paths: Files, folders and patterns; see `paths.find_files`.
      field: Field of a record that holds its text or messages.
      tokenizer: Their tokenizer.

    Raises:
      ValueError: If a path names no file, or records have no text or conversation; the
        message names up to ten of them.
    """
    files, problems = find_files(paths, SUFFIXES[name]), Problems()
    ids = _Ids(tokenizer)
    for path in files:
        for place, value in READERS[name](path, field, problems):
            ids.begin(value)  # what is missing for all records is told once
            try:
                ids.add(value)
            except ValueError as error:
                problems.add(place, str(error).replace("\n", " "))
    problems.check()
    train, val, size = ids.split()
    return Encoded(train, val, size, len(ids), len(files))


class _Ids:
    """Ids of records in one growing array, with their ends, hashes and bytes."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._kind: type | None = None
        self._chat: Chat | None = None
        self._dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
        self._ids = array.array(self._dtype.char)
        self._ends, self._bytes = array.array("q"), array.array("q")
        self._hashes: list[bytes] = []

    def __len__(self) -> int:
        return len(self._hashes)

    def begin(self, value: Any) -> None:
        """Takes the kind of the first record that is a text or a conversation."""
        if self._kind is None and isinstance(value, str | list):
            self._kind = type(value)
            if self._kind is list:
                self._chat = Chat(self._tokenizer)
                self._dtype = np.dtype(np.int32)
                self._ids = array.array("i")

    def add(self, value: Any) -> None:
        """Adds a record, unless it is an empty text."""
        if self._kind is None or not isinstance(value, self._kind):
            raise ValueError(f"must be {_WANTED[self._kind]}, got {value!r:.40}.")
        if value == "":
            return
        json.dumps(value, ensure_ascii=False).encode()  # refuses lone surrogates
        ids, text, size = self._turns(value) if self._chat else self._document(value)
        self._ids.frombytes(ids.astype(self._dtype).tobytes())
        self._ends.append(len(self._ids))
        self._bytes.append(size)
        self._hashes.append(hashlib.sha256(text.encode()).digest())

    def split(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Returns training ids, held-out ids, and the bytes of the latter."""
        ranked = sorted(set(self._hashes))
        held = set(ranked[: max(1, round(len(ranked) * HELD_OUT))])
        ids, ends = np.frombuffer(self._ids, self._dtype), np.array(self._ends)
        apart = np.array([each in held for each in self._hashes], bool)
        mask = np.repeat(apart, np.diff(ends, prepend=0))
        return ids[~mask], ids[mask], int(np.array(self._bytes)[apart].sum())

    def _document(self, text: str) -> tuple[np.ndarray, str, int]:
        ids = np.append(self._tokenizer.encode(text), self._tokenizer.separator)
        return ids, text, len(text.encode()) + 1

    def _turns(self, messages: list[Any]) -> tuple[np.ndarray, str, int]:
        assert self._chat is not None
        ids = self._chat.encode(messages)
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        size = sum(len(content.encode()) + 1 for content in said)
        return ids, json.dumps(messages, sort_keys=True), size
