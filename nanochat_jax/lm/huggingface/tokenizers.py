"""Tokenizer and end token of a folder, and what is written of them."""

from pathlib import Path
from typing import Any, NamedTuple

from nanochat_jax.config import schema
from nanochat_jax.lm.data import configured_end, load_tokenizer
from nanochat_jax.lm.huggingface import json_files

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
"""Names of the tokenizer and of its settings."""

GENERATION = "generation_config.json"
"""Name of the settings of generation."""

TEMPLATE = "chat_template.jinja"
"""Name of the template of conversations, where it is not among the settings."""

# Settings that are kept: none of them changes how text is split.
_KEPT = ("bos_token", "chat_template", "pad_token", "padding_side", "unk_token")


class WrittenTokenizer(NamedTuple):
    """The files of a tokenizer, to be written.

    Attributes:
      text: Content of `tokenizer.json`.
      settings: Content of `tokenizer_config.json`.
      template: Content of `chat_template.jinja`, if there is one.
      generation: Content of `generation_config.json`.
    """

    text: str
    settings: dict[str, Any]
    template: str | None
    generation: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Writes the files.

        Args:
          folder: Folder to write to.
        """
        (folder / TOKENIZER).write_text(self.text, encoding="utf-8")
        json_files.write_object(folder / SETTINGS, self.settings)
        json_files.write_object(folder / GENERATION, self.generation)
        if self.template is not None:
            (folder / TEMPLATE).write_text(self.template, encoding="utf-8")


def tokenizer_path(folder: str | Path) -> Path | None:
    """Returns the `tokenizer.json` of a folder, if there is one.

    Args:
      folder: Folder of a model.
    """
    path = Path(folder) / TOKENIZER
    return path if path.is_file() else None


def end_token(folder: str | Path) -> str | int | None:
    """Returns the token that ends a text, as a folder names it.

    Args:
      folder: Folder of a model.

    Returns:
      `eos_token` of `tokenizer_config.json`; else the `eos_token_id` of
      `generation_config.json` or `config.json`. `None` if none of them has one, or
      there are several ids, of which nothing says which ends a document.

    Raises:
      ValueError: If one of these files cannot be read.
    """
    folder = Path(folder)
    named = configured_end(folder / TOKENIZER)
    if isinstance(named, str):
        return named
    for file in (GENERATION, "config.json"):
        ids = json_files.read_object(folder / file).get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            return ids[0] if len(ids) == 1 and type(ids[0]) is int else None
    return None


def to_write(
    tokenizer: str | Path | None, end: str | None, vocab_size: int
) -> WrittenTokenizer:
    """Returns the files of a tokenizer that are written with a model.

    `tokenizer_config.json` names the class that reads `tokenizer.json` as it is: for
    Qwen3, transformers would split text by Qwen's rule otherwise.

    Args:
      tokenizer: A `tokenizer.json`; `None` for bytes. Of a `tokenizer_config.json`
        beside it, special tokens and the template of conversations are kept, and the
        settings of generation of a `generation_config.json`.
      end: Token that ends a document, as for `load_tokenizer`.
      vocab_size: Tokens of the model.

    Raises:
      ValueError: If the file is no tokenizer, or has more ids than the model.
    """
    used: Any = load_tokenizer(tokenizer, end)
    schema.require(
        (
            used.vocab_size <= vocab_size,
            f"{tokenizer or 'bytes'}: the tokenizer has {used.vocab_size} ids, but the "
            f"model's `vocab_size` is only {vocab_size}.",
        )
    )
    settings: dict[str, Any] = {
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if tokenizer is None:
        # Byte 0 is not named as the end: its name in the vocabulary is a letter.
        ends = {"eos_token_id": used.separator}
        return WrittenTokenizer(byte_level(), settings, None, ends)
    path = Path(tokenizer)
    name = used.decode([used.separator])
    if name in used.special:
        settings["eos_token"] = name
    beside = json_files.read_object(path.with_name(SETTINGS))
    settings |= {key: beside[key] for key in _KEPT if beside.get(key) is not None}
    template = path.with_name(TEMPLATE)
    return WrittenTokenizer(
        path.read_bytes().decode("utf-8"),
        settings,
        template.read_text(encoding="utf-8") if template.is_file() else None,
        _generation(path, used.separator),
    )


def _generation(tokenizer: Path, end_id: int) -> dict[str, Any]:
    """Returns how texts are generated, as it is said beside a tokenizer.

    Models that answer have several tokens that end a text; that of documents is one.
    """
    beside = json_files.read_object(tokenizer.with_name(GENERATION))
    ends = beside.get("eos_token_id", end_id)
    if end_id not in (ends if isinstance(ends, list) else [ends]):
        ends = end_id
    return {**beside, "eos_token_id": ends}


def byte_level() -> str:
    """Returns a `tokenizer.json` whose ids are the bytes of UTF-8."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {letter: byte for byte, letter in enumerate(_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str(pretty=True)


def _letters() -> list[str]:
    """Returns the letters by which byte-level vocabularies write bytes (GPT-2, 2019).

    Printable characters of Latin-1 are themselves; others follow from U+0100 on.
    """
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in shown else next(spare)) for byte in range(256)]
