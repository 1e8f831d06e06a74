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

from nanochat_jax.config import DatasetName, schema
from nanochat_jax.lm.data import documents, markov_chain, token_file
from nanochat_jax.lm.data.tokenizer import ByteTokenizer, Tokenizer

SYNTHETIC_TOKENS = 1 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens to train and to validate on.

    Attributes:
      train: Training ids, `[length]`, of an unsigned type.
      val: Held-out ids, `[length]`.
      description: Name of the corpus, in a line.
      bytes_per_token: Bytes of text per held-out token, if known; a separator counts as
        one. Loss in nats over `ln 2` over this is bits per byte.
      tokenizer: Fingerprint of the tokenizer of the ids, if known.
      entropy_rate: Lowest loss of any model, in nats per token, if known.
    """

    train: np.ndarray
    val: np.ndarray
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
                digest.update(tokens[start : start + size].tobytes())
        return digest.hexdigest()


def load_corpus(
    name: DatasetName,
    paths: Sequence[str | Path] = (),
    *,
    tokenizer: Tokenizer,
    vocab_size: int,
    seed: int = 0,
    seq_len: int = 1,
    token_dtype: token_file.TokenDtype | None = None,
) -> Corpus:
    """Loads a corpus by name.

    Args:
      name: `stdlib`, the sources of the running Python's standard library; `text`,
        files and folders of UTF-8 text; `tokens`, a token file; `synthetic`, a Markov
        chain of known entropy.
      paths: Files and folders for `text`, one file for `tokens`, otherwise none.
      tokenizer: Tokenizer of `stdlib` and `text`. For `tokens` it must be the one that
        the file names, if any, or the byte tokenizer.
      vocab_size: Vocabulary of the model, which every id must fit.
      seed: Seed of `synthetic`.
      seq_len: Tokens of a sequence. Both splits must hold a sequence and one token.
      token_dtype: Type of the ids of `tokens`, if the file does not name it.

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
            bool(paths) == (name in ("text", "tokens")),
            "`data_path` must be given with the data sets text and tokens, and only "
            f"with them, got {paths} with {name!r}.",
        ),
    )
    if name == "tokens":
        corpus = _token_corpus(paths, tokenizer, vocab_size, seq_len, token_dtype)
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
    token_dtype: token_file.TokenDtype | None,
) -> Corpus:
    schema.require(
        (len(paths) == 1, f"the data set tokens takes one file, got {paths}.")
    )
    file = token_file.read_tokens(
        paths[0], vocab_size=vocab_size, token_dtype=token_dtype
    )
    _check_tokenizer(paths[0], file.tokenizer, tokenizer)
    length = len(file.tokens)
    held_out = file.held_out or round(length * documents.HELD_OUT)
    cut = max(length - max(held_out, seq_len + 1), 0)
    size = file.count_bytes(cut)
    return Corpus(
        file.tokens[:cut],
        file.tokens[cut:],
        description=paths[0],
        bytes_per_token=None if size is None else size / (length - cut),
        tokenizer=file.tokenizer,
    )


def _check_tokenizer(path: str, made_by: str | None, given: Tokenizer) -> None:
    """Refuses a tokenizer other than the byte tokenizer and that of the file."""
    schema.require(
        (
            made_by in (None, given.fingerprint) or isinstance(given, ByteTokenizer),
            f"{path}: its ids are of the tokenizer {made_by}, but the one given is "
            f"{given.fingerprint} (SHA-256). Give the `tokenizer.json` beside it.",
        )
    )


def _text_corpus(
    name: str, paths: list[str], tokenizer: Tokenizer, vocab_size: int, seq_len: int
) -> Corpus:
    schema.require(
        (
            tokenizer.vocab_size <= vocab_size,
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model's "
            f"`vocab_size` is only {vocab_size}. Set it to at least that.",
        )
    )
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
