"""Checkpoints of weights alone, from models that other tools wrote."""

import shutil
from pathlib import Path
from typing import Any

import jax

from nanochat_jax.config import Config, schema
from nanochat_jax.lm.checkpoints import record
from nanochat_jax.lm.checkpoints.source import TOKENIZER_FILE, Source
from nanochat_jax.lm.checkpoints.store import Checkpoints
from nanochat_jax.lm.data import load_tokenizer
from nanochat_jax.lm.model import gpt
from nanochat_jax.lm.runtime import making_folder, new_folder

# They name the token that ends a text, and have the template of conversations.
_BESIDE_TOKENIZER = (
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


def write_imported(source: Source, output: str | Path) -> int:
    """Writes the weights of a model as a checkpoint of step 0, with its tokenizer.

    The folder gets its name when all of it is written. Memory holds one copy of the
    model.

    Args:
      source: The model.
      output: Checkpoint folder to write; it must be new or empty.

    Returns:
      The number of parameters.

    Raises:
      ValueError: If the folder has files, the model cannot be read, or its tokenizer
        has more ids than its vocabulary.
    """
    output = new_folder(output)
    config = _run_config(source, output)
    params = source.read(config, gpt.abstract_model(source.config)[1])
    meta = record.make_imported(
        config,
        tokenizer=source.fingerprint,
        source=f"{source.kind} {Path(source.path).absolute()}",
    )
    with making_folder(output) as folder:
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(0, {"params": params}, meta)
        _copy_tokenizer(source, folder)
    return sum(x.size for x in jax.tree.leaves(params))


def _run_config(source: Source, output: Path) -> Config:
    """Returns settings with those of the model, and its tokenizer where it will be."""
    file = source.tokenizer_file
    if file is not None:
        size = load_tokenizer(file, source.end_token).vocab_size
        room = source.config.vocab_size
        schema.require(
            (
                size <= room,
                f"{file}: the tokenizer has {size} ids, but the model's vocabulary has "
                f"{room}.",
            )
        )
    copied = None if file is None else str(output / TOKENIZER_FILE)
    values: dict[str, Any] = {**source.settings, "tokenizer": copied}
    return Config(**values)


def _copy_tokenizer(source: Source, folder: Path) -> None:
    if source.tokenizer_file is None:
        return
    file = Path(source.tokenizer_file)
    shutil.copyfile(file, folder / TOKENIZER_FILE)
    for name in _BESIDE_TOKENIZER:
        if file.with_name(name).is_file():
            shutil.copyfile(file.with_name(name), folder / name)
