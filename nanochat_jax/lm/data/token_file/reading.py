"""Reading and writing of token files."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from nanochat_jax.config import TokenDtype, TokenFormat, schema
from nanochat_jax.lm.data.joined import JoinedTokens, Tokens
from nanochat_jax.lm.data.paths import find_files
from nanochat_jax.lm.data.token_file import checks, sidecar
from nanochat_jax.lm.data.token_file.layouts import Layout, find_layout
from nanochat_jax.lm.runtime import replacing

SUFFIXES = (".bin", ".npy", ".ds")
"""Ends of the names of token files in a folder."""
_MOST_ERRORS = 10


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFile:
    """Ids of a file or of several, and the contents of their sidecars.

    Attributes:
      tokens: Ids, `[length]`, mapped from the files.
      layout: Their layout.
      held_out: How many of the last are for validation, if known.
      token_bytes: Bytes of text of each id, `[vocab_size]`, if known.
      tokenizer: Fingerprint of the tokenizer, if known.
    """

    tokens: Tokens
    layout: Layout
    held_out: int | None = None
    token_bytes: np.ndarray | None = None
    tokenizer: str | None = None

    def count_bytes(self, start: int) -> int | None:
        """Returns the bytes of text of the ids from `start` on, if known."""
        if self.token_bytes is None:
            return None
        starts = range(start, len(self.tokens), checks.CHECK_CHUNK)
        chunks = (self.tokens[s : s + checks.CHECK_CHUNK] for s in starts)
        return sum(int(self.token_bytes[np.asarray(chunk)].sum()) for chunk in chunks)


def read_shards(
    paths: Sequence[str | Path],
    *,
    vocab_size: int,
    token_dtype: TokenDtype | None = None,
    token_format: TokenFormat | None = None,
) -> tuple[TokenFile, list[Path]]:
    """Maps token files, one after another, and checks every id in them.

    Args:
      paths: Files, folders and patterns; see `paths.find_files`.
      vocab_size: Vocabulary of the model; ids must be below it.
      token_dtype: Type of the ids, as for `read_tokens`.
      token_format: Format of the files, as for `read_tokens`.

    Returns:
      The ids of all files, as if they were one, and the files.

    Raises:
      ValueError: If a path names no file, a file is refused by `read_tokens`, or files
        differ in format, type or tokenizer.
    """
    files, parts, errors = find_files(paths, SUFFIXES), [], []
    read = functools.partial(
        read_tokens,
        vocab_size=vocab_size,
        token_dtype=token_dtype,
        token_format=token_format,
    )
    for file in files:
        try:
            parts.append(read(file))
        except ValueError as error:
            errors.append((False, str(error)))
        if len(errors) == _MOST_ERRORS:
            break
    schema.require(*errors)
    return parts[0] if len(parts) == 1 else _join(files, parts), files


def read_tokens(
    path: str | Path,
    *,
    vocab_size: int,
    token_dtype: TokenDtype | None = None,
    token_format: TokenFormat | None = None,
) -> TokenFile:
    """Maps a token file and checks every id in it.

    Args:
      path: File to read.
      vocab_size: Vocabulary of the model; ids must be below it.
      token_dtype: Type of the ids; `None` takes it from the file, its neighbours or its
        sidecar, and uint32 where none of them tells.
      token_format: Format of the file; `None` recognises it. With `token_dtype` too,
        ids without a header are not checked for another width.

    Returns:
      The ids, not read into memory.

    Raises:
      ValueError: If the file is missing, broken or no token file; header, sidecar and
        `token_dtype` disagree; or an id is outside the vocabulary.
    """
    path = Path(path)
    schema.require((path.is_file(), f"{path}: no such file. Give a token file."))
    facts = sidecar.read_sidecar(path)
    layout = find_layout(path, token_format, token_dtype or facts.get("dtype"))
    dtype, length = _measure(path, layout, facts, token_dtype)
    sidecar.check_facts(path, facts, length, vocab_size)
    tokens = np.memmap(path, dtype, "r", layout.offset, (length,))
    table = facts.get("token_bytes")
    # Ids beyond the table are as invalid as ids beyond the vocabulary of the model.
    known = min(vocab_size if table is None else len(table), vocab_size)
    if layout.dtype or (token_format and token_dtype):
        checks.check_ids(tokens, known, str(path))
    else:
        checks.check_raw_ids(tokens, known, path)
    return TokenFile(
        tokens,
        layout,
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
    checks.check_ids(tokens, vocab_size, str(path))
    facts = {
        "dtype": "uint32",
        "tokens": len(tokens),
        "held_out": held_out,
        "vocab_size": vocab_size,
        "tokenizer": tokenizer,
        "token_bytes": token_bytes,
    }
    with replacing(path) as temporary:
        temporary.write_bytes(np.ascontiguousarray(tokens, "<u4").data)
    sidecar.write_sidecar(path, facts)


def _measure(
    path: Path, layout: Layout, facts: dict[str, Any], token_dtype: TokenDtype | None
) -> tuple[np.dtype, int]:
    """Returns the type of the ids of a file, and their number."""
    dtype = _agree(
        path,
        {
            layout.source: layout.dtype,
            sidecar.sidecar_of(path).name: facts.get("dtype"),
            "`token_dtype`": token_dtype,
        },
    )
    size = path.stat().st_size - layout.offset
    length, rest = divmod(size, dtype.itemsize)
    said = length if layout.length is None else layout.length
    schema.require(
        (
            rest == 0,
            f"{path}: {size} bytes of {dtype.name} ids must be a multiple of "
            f"{dtype.itemsize}. Is it cut short, or of another `token_dtype`?",
        ),
        (
            said == length,
            f"{path}: {layout.source} says {said} tokens, it has {length}.",
        ),
        (length > 0, f"{path}: holds no tokens."),
    )
    return dtype, length


def _agree(path: Path, claims: dict[str, str | None]) -> np.dtype:
    """Returns the type of the ids on which all claims agree, uint32 without any.

    Args:
      path: Token file.
      claims: Types by who claims them; the first claim is of the file itself.
    """
    said = {who: dtype for who, dtype in claims.items() if dtype is not None}
    dtypes = set(said.values()) or {"uint32"}
    allowed = [*get_args(TokenDtype), next(iter(claims.values()))]
    schema.require(
        (
            len(dtypes) == 1 and dtypes <= set(allowed),
            f"{path}: the type of the ids must be one of {[*get_args(TokenDtype)]}, "
            "the same everywhere, but "
            f"{', '.join(f'{who} says {dtype!r}' for who, dtype in said.items())}.",
        )
    )
    return np.dtype(dtypes.pop()).newbyteorder("<")


def _join(files: Sequence[Path], parts: Sequence[TokenFile]) -> TokenFile:
    """Returns the ids of several files as if they were of one."""
    kinds: dict[str, Path] = {}
    for file, part in zip(files, parts, strict=True):
        kinds.setdefault(f"{part.layout.format} of {part.tokens.dtype.name}", file)
    known_parts = [*zip(files, parts, strict=True)][:-1]
    made_by = {part.tokenizer for part in parts}
    known = sorted(name for name in made_by if name)
    schema.require(
        (
            len(kinds) == 1,
            "files that are read together must be of one format and type, got "
            f"{', '.join(f'{kind} in {file}' for kind, file in kinds.items())}.",
        ),
        (
            all(part.held_out is None for part in parts[:-1]),
            "of files that are read together only the last may say `held_out` in its "
            "sidecar: the held-out part is the end of all. Delete that key of "
            f"{', '.join(str(f) for f, x in known_parts if x.held_out is not None)}.",
        ),
        (
            len(known) < 2,
            f"files that are read together must be of one tokenizer, got {known} "
            "(SHA-256).",
        ),
    )
    documents = [part.layout.documents for part in parts]
    total = None if None in documents else sum(count or 0 for count in documents)
    tables = [part.token_bytes for part in parts]
    same = len({None if t is None else t.tobytes() for t in tables}) == 1
    return TokenFile(
        JoinedTokens([np.asarray(part.tokens) for part in parts]),
        parts[0].layout._replace(documents=total),
        held_out=parts[-1].held_out,
        token_bytes=tables[0] if same else None,
        tokenizer=made_by.pop() if len(made_by) == 1 else None,
    )
