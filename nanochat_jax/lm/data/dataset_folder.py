"""From documents to a folder to train on: a tokenizer, its ids, and what is known.

`D/tokenizer.json`, `D/tokens.bin` and `D/tokens.bin.json` belong together, so they are
written elsewhere first, and D has all of them or none.
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

# The ids come last: a folder that lacks them is not taken for a whole one.
FILES = ("tokenizer.json", "tokens.bin.json", "tokens.bin")

Track = Callable[[Sequence[str], str], Iterable[str]]
"""Takes documents and what is done with them; yields them, and shows how far it is."""


class Prepared(NamedTuple):
    """What a folder holds.

    Attributes:
      vocab_size: Tokens of the vocabulary.
      tokens: Ids of all documents.
      held_out: How many of them, the last, are for validation.
      bytes_per_token: Bytes of text a token stands for.
    """

    vocab_size: int
    tokens: int
    held_out: int
    bytes_per_token: float


def prepare(
    folder: str | Path,
    texts: Sequence[str],
    vocab_size: int,
    *,
    force: bool = False,
    track: Track = lambda documents, _: documents,
) -> Prepared:
    """Trains a tokenizer on documents, and writes it with their ids.

    Documents to validate on come last, and the tokenizer is not trained on them.

    Args:
      folder: Folder to write; it is made.
      texts: Documents.
      vocab_size: Most tokens of the vocabulary.
      force: Whether files of these names in `folder` are replaced.
      track: Shows progress.

    Returns:
      What was written.

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
        encode_documents(track(part, what), tokenizer)
        for part, what in ((kept, "Encoding"), (held_out, "Encoding what is held out"))
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
    return Prepared(tokenizer.vocab_size, len(tokens), len(last), size / len(tokens))


def check_folder(folder: Path, force: bool) -> None:
    """Refuses a folder that has other contents, or is no folder.

    Raises:
      ValueError: If it is there and not empty, and `force` is not set.
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
    """Gives a folder beside `folder` to write, and moves its files there at the end."""
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
