"""Tokenizers: text to token ids and back.

The byte tokenizer is the default and needs no file; others are read from a
`tokenizer.json` of the `tokenizers` library.
"""

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from numpy.typing import ArrayLike

from nanochat_jax.config import schema
from nanochat_jax.lm.data.end_token import configured_end, known_end


class Tokenizer(Protocol):
    """Text to token ids and back, as the trainer needs it."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is below it."""
        ...

    @property
    def separator(self) -> int:
        """Id that ends a document."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its file, or `bytes`."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, `[length]`, in the smallest unsigned type."""
        ...

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text of `ids`; invalid ids and UTF-8 become U+FFFD."""
        ...


class ByteTokenizer:
    """One token per byte of UTF-8: no vocabulary to train or store.

    Byte 0, which hardly occurs in text, separates documents.
    """

    vocab_size = 256
    separator = 0
    fingerprint = "bytes"

    def encode(self, text: str) -> np.ndarray:
        """Returns the bytes of `text` as uint8 `[length]`."""
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text of `ids`; ids above 255 and broken UTF-8 become U+FFFD."""
        ids = np.asarray(ids)
        # UTF-8 never uses 0xFF, so a padded vocabulary's spare ids read as broken.
        data = np.where(ids < self.vocab_size, ids, 0xFF).astype(np.uint8).tobytes()
        return data.decode("utf-8", errors="replace")


class TrainedTokenizer:
    """A tokenizer of the `tokenizers` library, such as a byte-level BPE.

    Special tokens in a text are encoded as plain text, so that only documents end in
    the separator.

    Attributes:
      special: Its special tokens.
      source: Its path.

    Args:
      text: Content of its `tokenizer.json`. Truncation and padding are switched off.
      source: Its path, for messages.
      end_token: Token that ends a document. If not given, the special token with a
        known name for that, or in a vocabulary without special tokens the token of the
        character NUL.

    Raises:
      ValueError: If `text` is no tokenizer, or its vocabulary is empty or has no
        separator, or several.
    """

    def __init__(
        self, text: str, source: str = "tokenizer", end_token: str | None = None
    ):
        tokenizer = _parse(text, source)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self.special = [token.content for token in added if token.special]
        self.source = source
        self.fingerprint = hashlib.sha256(text.encode("utf-8")).hexdigest()
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        schema.require((self.vocab_size > 0, f"{source}: the vocabulary is empty."))
        self._dtype = np.min_scalar_type(self.vocab_size - 1)
        self.separator = self._find_separator(source, end_token)

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, `[length]`, without added special tokens."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, self._dtype)

    def encode_template(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the ids of a text in which special tokens stand for themselves.

        Args:
          text: A conversation, as a chat template renders it.

        Returns:
          Ids, int32 `[length]`, and the characters at which each begins and ends.
        """
        self._tokenizer.encode_special_tokens = False
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        self._tokenizer.encode_special_tokens = True
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return np.array(encoding.ids, np.int32), places[:, 0], places[:, 1]

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text of `ids`, special tokens included."""
        return self._tokenizer.decode(
            np.asarray(ids).tolist(), skip_special_tokens=False
        )

    def _find_separator(self, source: str, end_token: str | None) -> int:
        name = end_token or known_end(self.special, source)
        if name is not None:
            separator = self._tokenizer.token_to_id(name)
            if separator is None:
                raise ValueError(
                    f"{source}: has no token {name} to end documents with."
                )
            return separator
        nul = self.encode("\0")
        schema.require(
            (
                len(nul) == 1,
                f"{source}: nothing separates documents: the vocabulary needs a token "
                "that ends them, or one for the character NUL.",
            )
        )
        return int(nul[0])


def load_tokenizer(path: str | Path | None, end_token: str | None = None) -> Tokenizer:
    """Returns the byte tokenizer, or the tokenizer of a file.

    Args:
      path: A `tokenizer.json`, or `None` for bytes.
      end_token: Token that ends a document. If not given, the `eos_token` of the
        `tokenizer_config.json` beside it, else a token with a known name.

    Raises:
      ValueError: If the file is missing, unreadable or no tokenizer, or what ends a
        document does not follow from it.
    """
    if path is None:
        schema.require(
            (end_token is None, "`end_token` is for a `tokenizer`; none is given.")
        )
        return ByteTokenizer()
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file. Give a `tokenizer.json`, or none for bytes."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}.") from None
    end_token = end_token or configured_end(Path(path))
    return TrainedTokenizer(text, str(path), end_token)


def _parse(text: str, source: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"{source}: not a `tokenizer.json` of the tokenizers library: {error}."
        ) from None
