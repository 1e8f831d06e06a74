"""Sidecars: an optional `tokens.bin.json` beside a token file, with facts about it.

One object with any of these keys:
  `dtype`, the type of the ids;
  `tokens`, the number of ids, and `held_out`, how many of the last are for validation;
  `vocab_size`, and `token_bytes`, the bytes of text of each id;
  `tokenizer`, the fingerprint of the tokenizer, SHA-256 of `tokenizer.json`.
"""

import json
from pathlib import Path
from typing import Any

from nanochat_jax.config import schema
from nanochat_jax.lm.runtime import write_text


def sidecar_of(path: Path) -> Path:
    """Returns the path of the sidecar of a token file."""
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path) -> dict[str, Any]:
    """Returns the contents of the sidecar of `path`, empty if there is none.

    Args:
      path: Token file.

    Raises:
      ValueError: If it cannot be read or is no JSON object.
    """
    sidecar = sidecar_of(path)
    try:
        facts = json.loads(sidecar.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{sidecar}: cannot be read: {error}.") from None
    schema.require(
        (isinstance(facts, dict), f"{sidecar}: must be a JSON object, got {facts!r}.")
    )
    dtype = facts.get("dtype", "")
    schema.require(
        (isinstance(dtype, str), f"{sidecar}: `dtype` must be a name, got {dtype!r}.")
    )
    return facts


def write_sidecar(path: Path, facts: dict[str, Any]) -> None:
    """Writes the facts that are not `None` to the sidecar of `path`.

    Args:
      path: Token file.
      facts: Values by key.
    """
    known = {key: value for key, value in facts.items() if value is not None}
    # One key per line, so that the long table does not hide the others.
    lines = ",\n".join(f'  "{key}": {json.dumps(known[key])}' for key in known)
    write_text(sidecar_of(path), f"{{\n{lines}\n}}\n")


def check_facts(
    path: Path, facts: dict[str, Any], length: int, vocab_size: int
) -> None:
    """Refuses a sidecar that contradicts its file or the model.

    Args:
      path: Token file.
      facts: Contents of its sidecar.
      length: Number of ids in the file.
      vocab_size: Vocabulary of the model.

    Raises:
      ValueError: If it does; the message names all contradictions.
    """
    sidecar = sidecar_of(path)
    tokens, vocab = facts.get("tokens", length), facts.get("vocab_size", 1)
    held_out, table = facts.get("held_out", 0), facts.get("token_bytes", [])
    schema.require(
        (tokens == length, f"{sidecar}: `tokens` is {tokens!r}, {path} has {length}."),
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
