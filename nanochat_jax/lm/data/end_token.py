"""The token that ends a document: as a tokenizer is configured, or by known names."""

import json
from collections.abc import Collection
from pathlib import Path

from nanochat_jax.config import schema

END_OF_TEXT = "<|endoftext|>"
"""The token that ends a document in a vocabulary of `prepare-data`."""

# Names in published tokenizers. One may have both: of a document, and of a turn in it.
_OF_DOCUMENTS = (
    END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]",
    "<|end▁of▁sentence|>", "<EOT>",
)  # fmt: skip
_OF_TURNS = (
    "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eot|>", "<|return|>",
)  # fmt: skip


def known_end(special: Collection[str], source: str) -> str | None:
    """Returns the special token that ends a document, by its name.

    The end of a document goes before the end of a turn.

    Args:
      special: Special tokens of a vocabulary.
      source: Its file, for messages.

    Returns:
      The token; `None` if there are no special tokens.

    Raises:
      ValueError: If several tokens may end a document, or none is known to.
    """
    for names in (_OF_DOCUMENTS, _OF_TURNS):
        found = [name for name in names if name in special]
        schema.require(
            (
                len(found) < 2,
                f"{source}: several tokens may end a document: {', '.join(found)}. Set "
                "`end_token` to one, or put the `tokenizer_config.json` beside it.",
            )
        )
        if found:
            return found[0]
    schema.require(
        (
            not special,
            f"{source}: which token ends a document is not known. Set `end_token`; its "
            f"special tokens are {', '.join(sorted(special)[:10])}.",
        )
    )
    return None


def configured_end(tokenizer_file: Path) -> str | None:
    """Returns `eos_token` of the `tokenizer_config.json` beside a tokenizer.

    Args:
      tokenizer_file: Path of the `tokenizer.json`.

    Returns:
      The token; `None` if there is no such file, or it names none.

    Raises:
      ValueError: If the file cannot be read.
    """
    path = tokenizer_file.with_name("tokenizer_config.json")
    if not path.is_file():
        return None
    try:
        end = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
        return end["content"] if isinstance(end, dict) else end
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{path}: cannot be read: {error!r}.") from None
