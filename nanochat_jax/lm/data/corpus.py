"""Corpora: text, token files or a Markov chain, as token ids.

The tokens held out for validation never overlap the training tokens.
"""

import dataclasses
import functools
import hashlib
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from nanochat_jax.config import DatasetName, TokenDtype, TokenFormat, schema
from nanochat_jax.lm.data import documents, markov_chain, records, token_file
from nanochat_jax.lm.data.joined import Tokens
from nanochat_jax.lm.data.tokenizer import ByteTokenizer, Tokenizer

SYNTHETIC_TOKENS = 1 << 20
_OF_FILES = ("text", "tokens", "jsonl", "parquet")


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens to train and to validate on.

    Attributes:
      train: Training ids, `[length]`; the complement of an id, `~id`, which is
        negative, stands for one that is read but not predicted.
      val: Held-out ids, `[length]`.
      description: Name of the corpus, in a line.
      bytes_per_token: Bytes of text per held-out token that is predicted, if known; a
        separator counts as one. Loss in nats over `ln 2` over this is bits per byte.
      tokenizer: Fingerprint of the tokenizer of the ids, if known.
      entropy_rate: Lowest loss of any model, in nats per token, if known.
    """

    train: Tokens
    val: Tokens
    description: str
    bytes_per_token: float | None = None
    tokenizer: str | None = None
    entropy_rate: float | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of lengths and ids; for long arrays, of 1024 even samples."""
        digest, size = hashlib.sha256(), 1 << 14
        for tokens in (self.train, self.val):
            digest.update(f"{tokens.dtype.str} {len(tokens)};".encode())
            for start in range(0, len(tokens), max(size, len(tokens) // 1024)):
                digest.update(np.asarray(tokens[start : start + size]).tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class FileOptions:
    """How files of a data set are read, where they do not tell.

    Attributes:
      token_dtype: Type of the ids in token files.
      token_format: Format of token files.
      text_field: Field of `jsonl` and `parquet` with text or messages.
    """

    token_dtype: TokenDtype | None = None
    token_format: TokenFormat | None = None
    text_field: str = "text"


def load_corpus(
    name: DatasetName,
    paths: Sequence[str | Path] = (),
    *,
    tokenizer: Tokenizer,
    vocab_size: int,
    seed: int = 0,
    seq_len: int = 1,
    files: FileOptions = FileOptions(),
) -> Corpus:
    """Loads a corpus by name.

    Args:
      name: `stdlib`, the sources of the running Python's standard library; `text`,
        files and folders of UTF-8 text; `tokens`, token files; `jsonl` and `parquet`,
        records with a text or messages; `synthetic`, a Markov chain of known entropy.
      paths: Files and folders, and but for `text` also patterns; none for data sets
        without files.
      tokenizer: Tokenizer of text. For `tokens` the one that the files name, if any;
        the byte tokenizer stands for none given.
      vocab_size: Vocabulary of the model, which every id must fit.
      seed: Seed of `synthetic`.
      seq_len: Tokens of a sequence. Both splits must hold a sequence and one token.
      files: How files are read.

    Returns:
      The corpus.

    Raises:
      ValueError: If the name or a path is wrong, an id does not fit the vocabulary, or
        there is too little text.
    """
    names, paths = get_args(DatasetName), [str(path) for path in paths]
    schema.require(
        (name in names, f"`dataset` must be one of {list(names)}, got {name!r}."),
        (
            bool(paths) == (name in _OF_FILES),
            f"`data_path` must be given with the data sets {', '.join(_OF_FILES)}, and "
            f"only with them, got {paths} with {name!r}.",
        ),
    )
    if name == "tokens":
        corpus = _token_corpus(paths, tokenizer, vocab_size, seq_len, files)
    elif name in ("jsonl", "parquet"):
        corpus = _record_corpus(name, paths, tokenizer, vocab_size, files)
    elif name == "synthetic":
        corpus = _synthetic_corpus(vocab_size, seed)
    else:
        corpus = _text_corpus(name, paths, tokenizer, vocab_size, seq_len)
    schema.require(
        *(
            (
                len(tokens) > seq_len,
                f"{corpus.description}: the {split} split has {len(tokens)} tokens, "
                f"but a sequence takes `seq_len` + 1 = {seq_len + 1}. Give more text "
                "or a shorter seq_len.",
            )
            for split, tokens in (("training", corpus.train), ("held-out", corpus.val))
        )
    )
    return corpus


def encode_documents(documents: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """Returns the ids of all documents, `[length]`, with a separator after each.

    Args:
      documents: Texts.
      tokenizer: Their tokenizer.
    """
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    separator = np.array([tokenizer.separator], dtype)
    pieces = [piece for d in documents for piece in (tokenizer.encode(d), separator)]
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype)


def count_bytes(documents: Sequence[str]) -> int:
    """Returns the bytes of all documents in UTF-8, with one per separator."""
    return sum(len(document.encode("utf-8")) + 1 for document in documents)


def _synthetic_corpus(vocab_size: int, seed: int) -> Corpus:
    tokens = markov_chain.markov_chain(vocab_size, SYNTHETIC_TOKENS, seed)
    cut = round(len(tokens) * (1 - documents.HELD_OUT))
    return Corpus(
        tokens[:cut],
        tokens[cut:],
        description=f"Markov chain of {markov_chain.ENTROPY_RATE:.4f} nats a token",
        entropy_rate=markov_chain.ENTROPY_RATE,
    )


def _token_corpus(
    paths: list[str],
    tokenizer: Tokenizer,
    vocab_size: int,
    seq_len: int,
    files: FileOptions,
) -> Corpus:
    file, found = token_file.read_shards(
        paths,
        vocab_size=vocab_size,
        token_dtype=files.token_dtype,
        token_format=files.token_format,
    )
    source = ", ".join(paths)
    given = None if isinstance(tokenizer, ByteTokenizer) else tokenizer
    if given is not None:
        _check_tokenizer(source, file.tokenizer, given, vocab_size)
    length = len(file.tokens)
    held_out = file.held_out or round(length * documents.HELD_OUT)
    cut = max(length - max(held_out, seq_len + 1), 0)
    size = file.count_bytes(cut)
    return Corpus(
        file.tokens[:cut],
        file.tokens[cut:],
        description=_describe(source, len(found), file.layout.documents),
        bytes_per_token=None if size is None else size / (length - cut),
        tokenizer=file.tokenizer if given is None else given.fingerprint,
    )


def _describe(source: str, files: int, count: int | None) -> str:
    """Returns the name of token files, and how many files and documents they are."""
    parts = [source, f"{files:,} files" if files > 1 else ""]
    parts.append("" if count is None else f"{count:,} documents")
    return ", ".join(part for part in parts if part)


def _check_tokenizer(
    source: str, made_by: str | None, given: Tokenizer, vocab_size: int
) -> None:
    """Refuses a tokenizer that is not that of the files, or has too many ids."""
    schema.require(
        (
            made_by in (None, given.fingerprint),
            f"{source}: its ids are of the tokenizer {made_by}, but the one given is "
            f"{given.fingerprint} (SHA-256). Give the `tokenizer.json` beside it.",
        ),
        _fits(given, vocab_size),
    )


def _fits(tokenizer: Tokenizer, vocab_size: int) -> schema.Check:
    """Returns the check that the model has all ids of a tokenizer."""
    return (
        tokenizer.vocab_size <= vocab_size,
        f"the tokenizer has {tokenizer.vocab_size} ids, but the model's "
        f"`vocab_size` is only {vocab_size}. Set it to at least that.",
    )


def _record_corpus(
    name: str,
    paths: list[str],
    tokenizer: Tokenizer,
    vocab_size: int,
    files: FileOptions,
) -> Corpus:
    schema.require(_fits(tokenizer, vocab_size))
    found = records.encode(name, paths, files.text_field, tokenizer)
    predicted = int((found.val >= 0).sum())
    return Corpus(
        found.train,
        found.val,
        description=f"{', '.join(paths)}, {found.files:,} files, "
        f"{found.records:,} records",
        bytes_per_token=found.val_bytes / predicted if predicted else None,
        tokenizer=tokenizer.fingerprint,
    )


def _text_corpus(
    name: str, paths: list[str], tokenizer: Tokenizer, vocab_size: int, seq_len: int
) -> Corpus:
    schema.require(_fits(tokenizer, vocab_size))
    if name == "stdlib":
        found = documents.stdlib_documents()
        source = f"standard library of Python {platform.python_version()}"
    else:
        found, source = documents.text_documents(paths), ", ".join(paths)
    kept, held_out = documents.split(found, least=seq_len + 1)
    train, val = (encode_documents(texts, tokenizer) for texts in (kept, held_out))
    return Corpus(
        train,
        val,
        description=f"{source}, {len(found)} files",
        bytes_per_token=count_bytes(held_out) / len(val) if len(val) else None,
        tokenizer=tokenizer.fingerprint,
    )
