"""Token files: ids on disk, memory-mapped and checked before training.

Three layouts, all little-endian:
  raw uint32 without header, the default;
  raw uint16 without header, if sidecar or `token_dtype` say so;
  the header of llm.c, 256 int32, then uint16 or uint32 ids.

A sidecar `tokens.bin.json` is optional, one object with any of these keys:
  `dtype`, uint16 or uint32;
  `tokens`, the number of ids, and `held_out`, how many of the last are for validation;
  `vocab_size`, and `token_bytes`, the bytes of text of each id;
  `tokenizer`, the fingerprint of the tokenizer, SHA-256 of `tokenizer.json`.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from nanochat_jax.config import TokenDtype, schema
from nanochat_jax.lm.runtime import replacing, write_text

HEADER_BYTES = 256 * 4
# Type of the ids, by magic number and version of the header.
HEADERS: dict[tuple[int, int], TokenDtype] = {
    (20240520, 1): "uint16",
    (20240801, 7): "uint32",
}
CHECK_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFile:
    """Ids of a file, and the contents of its sidecar.

    Attributes:
      tokens: Ids, `[length]`, mapped from the file.
      held_out: How many of the last are for validation, if known.
      token_bytes: Bytes of text of each id, `[vocab_size]`, if known.
      tokenizer: Fingerprint of the tokenizer, if known.
    """

    tokens: np.ndarray
    held_out: int | None = None
    token_bytes: np.ndarray | None = None
    tokenizer: str | None = None

    def count_bytes(self, start: int) -> int | None:
        """Returns the bytes of text of the ids from `start` on, if known."""
        if self.token_bytes is None:
            return None
        starts = range(start, len(self.tokens), CHECK_CHUNK)
        chunks = (self.tokens[s : s + CHECK_CHUNK] for s in starts)
        return sum(int(self.token_bytes[chunk].sum()) for chunk in chunks)


def read_tokens(
    path: str | Path, *, vocab_size: int, token_dtype: TokenDtype | None = None
) -> TokenFile:
    """Maps a token file and checks every id in it.

    Args:
      path: File to read.
      vocab_size: Vocabulary of the model; ids must be below it.
      token_dtype: Type of the ids; `None` takes it from the header or the sidecar, and
        uint32 without either.

    Returns:
      The ids, not read into memory.

    Raises:
      ValueError: If the file is missing or broken, header, sidecar and `token_dtype`
        disagree, or an id is outside the vocabulary.
    """
    path = Path(path)
    schema.require((path.is_file(), f"{path}: no such file. Give a token file."))
    facts = _read_sidecar(path)
    dtype, offset, length = _layout(path, facts, token_dtype)
    _check_facts(path, facts, length, vocab_size)
    tokens = np.memmap(path, dtype, "r", offset, (length,))
    table = facts.get("token_bytes")
    # Ids beyond the table are as invalid as ids beyond the vocabulary of the model.
    known = vocab_size if table is None else len(table)
    check_ids(tokens, min(known, vocab_size), str(path))
    return TokenFile(
        tokens,
        facts.get("held_out"),
        None if table is None else np.array(table, np.int64),
        facts.get("tokenizer"),
    )


def write_tokens(
    path: str | Path,
    tokens: np.ndarray,
    *,
    vocab_size: int,
    held_out: int | None = None,
    token_bytes: Sequence[int] | None = None,
    tokenizer: str | None = None,
) -> None:
    """Writes ids as raw uint32, and their sidecar `<path>.json`.

    Args:
      path: File to write or replace.
      tokens: Ids, `[length]`.
      vocab_size: Vocabulary of the ids.
      held_out: How many of the last are for validation.
      token_bytes: Bytes of text of each id.
      tokenizer: Fingerprint of the tokenizer.

    Raises:
      ValueError: If there are no ids, or one is outside the vocabulary.
    """
    path = Path(path)
    schema.require((len(tokens) > 0, f"{path}: there are no tokens to write."))
    check_ids(tokens, vocab_size, str(path))
    facts = {
        "dtype": "uint32",
        "tokens": len(tokens),
        "held_out": held_out,
        "vocab_size": vocab_size,
        "tokenizer": tokenizer,
        "token_bytes": token_bytes,
    }
    known = {key: value for key, value in facts.items() if value is not None}
    # One key per line, so that the long table does not hide the others.
    lines = ",\n".join(f'  "{key}": {json.dumps(known[key])}' for key in known)
    with replacing(path) as temporary:
        temporary.write_bytes(np.ascontiguousarray(tokens, "<u4").data)
    write_text(_sidecar(path), f"{{\n{lines}\n}}\n")


def check_ids(tokens: np.ndarray, vocab_size: int, source: str) -> None:
    """Checks that ids are below `vocab_size`, a chunk at a time.

    On the device an id that is too large goes unnoticed: a look-up clamps it.

    Args:
      tokens: Ids, `[length]`, of an integer type.
      vocab_size: Smallest invalid id.
      source: Name of the ids, for the message.

    Raises:
      ValueError: If an id is negative or too large; the message names the first.
    """
    for start in range(0, len(tokens), CHECK_CHUNK):
        chunk = tokens[start : start + CHECK_CHUNK]
        if chunk.max() >= vocab_size or chunk.min() < 0:
            at = int(np.argmax((chunk >= vocab_size) | (chunk < 0)))
            raise ValueError(
                f"{source}: token {start + at} has the id {chunk[at]}, but ids go from "
                f"0 to {vocab_size - 1}. Set `vocab_size` to that of the tokenizer, "
                'or `token_dtype` to "uint16" if the file holds 16-bit ids.'
            )


def _layout(
    path: Path, facts: dict[str, Any], token_dtype: TokenDtype | None
) -> tuple[np.dtype, int, int]:
    """Returns the type of the ids, the offset of the first, and their number."""
    header = _read_header(path)
    dtype = _agree(
        path,
        {
            "its header": header and header[0],
            _sidecar(path).name: facts.get("dtype"),
            "`token_dtype`": token_dtype,
        },
    )
    offset = HEADER_BYTES if header else 0
    size = path.stat().st_size - offset
    length, rest = divmod(size, dtype.itemsize)
    said = header[1] if header else length
    schema.require(
        (
            rest == 0,
            f"{path}: {size} bytes of {dtype.name} ids must be a multiple of "
            f"{dtype.itemsize}. Is it cut short, or of another `token_dtype`?",
        ),
        (said == length, f"{path}: its header says {said} tokens, it has {length}."),
        (length > 0, f"{path}: holds no tokens."),
    )
    return dtype, offset, length


def _agree(path: Path, claims: dict[str, str | None]) -> np.dtype:
    """Returns the type of the ids on which all claims agree, uint32 without any."""
    said = {who: dtype for who, dtype in claims.items() if dtype is not None}
    dtypes = set(said.values()) or {"uint32"}
    allowed = list(get_args(TokenDtype))
    schema.require(
        (
            len(dtypes) == 1 and dtypes <= set(allowed),
            f"{path}: the type of the ids must be one of {allowed}, the same "
            f"everywhere, but {', '.join(f'{w} says {d!r}' for w, d in said.items())}.",
        )
    )
    return np.dtype(dtypes.pop()).newbyteorder("<")


def _read_header(path: Path) -> tuple[TokenDtype, int] | None:
    """Returns type and number of the ids from a header of llm.c, if there is one."""
    head = np.fromfile(path, "<i4", count=3).tolist()
    if len(head) < 3 or tuple(head[:2]) not in HEADERS:
        return None
    return HEADERS[head[0], head[1]], head[2]


def _read_sidecar(path: Path) -> dict[str, Any]:
    """Returns the contents of the sidecar of `path`, empty if there is none."""
    sidecar = _sidecar(path)
    try:
        facts = json.loads(sidecar.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{sidecar}: cannot be read: {error}.") from None
    schema.require(
        (isinstance(facts, dict), f"{sidecar}: must be a JSON object, got {facts!r}.")
    )
    return facts


def _check_facts(
    path: Path, facts: dict[str, Any], length: int, vocab_size: int
) -> None:
    """Refuses a sidecar that contradicts its file or the model."""
    sidecar = _sidecar(path)
    tokens, vocab = facts.get("tokens", length), facts.get("vocab_size", 1)
    held_out, table = facts.get("held_out", 0), facts.get("token_bytes", [])
    schema.require(
        (tokens == length, f"{sidecar}: `tokens` is {tokens}, {path} has {length}."),
        (
            isinstance(vocab, int) and vocab <= vocab_size,
            f"{sidecar}: `vocab_size` is {vocab!r}, the model's only {vocab_size}. "
            "Set the model's to at least that.",
        ),
        (
            isinstance(held_out, int) and 0 <= held_out <= length,
            f"{sidecar}: `held_out` must be a number of tokens from 0 to {length}, "
            f"got {held_out!r}.",
        ),
        (
            isinstance(table, list)
            and all(isinstance(size, int) and size >= 0 for size in table),
            f"{sidecar}: `token_bytes` must be a list of the bytes of each id.",
        ),
        (
            isinstance(facts.get("tokenizer", ""), str),
            f"{sidecar}: `tokenizer` must be a fingerprint, SHA-256 in hexadecimal.",
        ),
    )


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")
