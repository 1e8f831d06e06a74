"""A data set in a folder: documents as token ids, and the tokenizer trained on them.

`D/tokenizer.json`, `D/tokens.bin` and `D/tokens.bin.json` belong together, so they are
written to a folder beside D first: D has all of them or none.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanochat_jax.config import schema
from nanochat_jax.lm.data import bpe, documents, token_file
from nanochat_jax.lm.data.corpus import count_bytes, encode_documents
from nanochat_jax.lm.data.tokenizer import TrainedTokenizer

# The ids come last: without them a folder does not pass for a complete one.
FILES = ("tokenizer.json", "tokens.bin.json", "tokens.bin")

Track = Callable[[Sequence[str], str], Iterable[str]]
"""Yields the documents it is given with the name of a task, and shows the progress."""


class Dataset(NamedTuple):
    """Sizes of a data set.

    Attributes:
      vocab_size: Tokens of the vocabulary.
      tokens: Number of ids of all documents.
      held_out: How many of the last are for validation.
      bytes_per_token: Bytes of text per token.
    """

    vocab_size: int
    tokens: int
    held_out: int
    bytes_per_token: float


def build_dataset(
    folder: str | Path,
    texts: Sequence[str],
    vocab_size: int,
    *,
    force: bool = False,
    track: Track = lambda documents, _: documents,
) -> Dataset:
    """Trains a tokenizer on documents, and writes it with their ids.

    Validation documents come last, and the tokenizer is not trained on them.

    Args:
      folder: Folder to write; it is made.
      texts: Documents.
      vocab_size: Most tokens of the vocabulary.
      force: Whether to replace files of these names in `folder`.
      track: Iterates over documents, and shows progress.

    Returns:
      Sizes of the data set.

    Raises:
      ValueError: If the folder is not empty, `vocab_size` is below 257, or there is
        no text.
    """
    folder = Path(folder)
    check_folder(folder, force)
    kept, held_out = documents.split(texts)
    schema.require((len(kept) > 0, "there is no text to train a tokenizer on."))
    text = bpe.train(track(kept, "Training the tokenizer"), vocab_size)
    tokenizer = TrainedTokenizer(text)
    tokens, last = (
        encode_documents(track(part, task), tokenizer)
        for part, task in ((kept, "Encoding"), (held_out, "Encoding for validation"))
    )
    tokens = np.concatenate([tokens, last])
    with _replacing(folder) as beside:
        (beside / "tokenizer.json").write_bytes(text.encode("utf-8"))
        token_file.write_tokens(
            beside / "tokens.bin",
            tokens,
            vocab_size=tokenizer.vocab_size,
            held_out=len(last),
            token_bytes=bpe.token_bytes(text),
            tokenizer=tokenizer.fingerprint,
        )
    size = count_bytes(kept) + count_bytes(held_out)
    return Dataset(tokenizer.vocab_size, len(tokens), len(last), size / len(tokens))


def check_folder(folder: Path, force: bool) -> None:
    """Refuses a path that is a file, or a folder with contents.

    Args:
      folder: Folder to write.
      force: Whether it may have contents.

    Raises:
      ValueError: If it is a file, or not empty without `force`.
    """
    schema.require(
        (
            folder.is_dir() or not folder.exists(),
            f"{folder}: there is a file of that name. Give a folder.",
        ),
    )
    found = sorted(os.listdir(folder)) if folder.is_dir() else []
    schema.require(
        (
            force or not found,
            f"{folder}: is not empty, it has {', '.join(found[:5])}. Give a new "
            f"folder, or replace {', '.join(FILES)} in it by `--force`.",
        )
    )


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yields a folder beside `folder` to write to, then moves its files there."""
    folder = folder.absolute()
    beside = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    beside.mkdir(parents=True)
    try:
        yield beside
        if folder.exists():
            (folder / FILES[-1]).unlink(missing_ok=True)
            for name in FILES:
                os.replace(beside / name, folder / name)
        else:
            os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
