"""Settings of a model from the `config.json` of a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat_jax.config import ModelConfig, schema
from nanochat_jax.lm.huggingface import config_keys, json_files
from nanochat_jax.lm.huggingface.rope import read_rope


def read_config(folder: str | Path) -> ModelConfig:
    """Reads the settings of a model.

    Qwen3, Llama and Mistral are read, and models of these architectures under other
    names, such as TinyLlama and SmolLM2. `max_seq_len` is `max_position_embeddings`;
    arithmetic and parameters are in float32, whatever the type of the file.

    Example:
      >>> from nanochat_jax.lm import huggingface
      >>> from nanochat_jax.lm.model import gpt
      >>> config = ModelConfig(dim=16, n_layers=1, n_heads=2, qk_norm="gain")
      >>> params = gpt.init(config, 0)[1]
      >>> huggingface.write_folder("mine", config, params, tokenizer=None)
      >>> read_config("mine").qk_norm
      'gain'

    Args:
      folder: Folder with a `config.json`.

    Returns:
      The settings.

    Raises:
      ValueError: If there is no such file, or it asks for what is not computed here:
        another architecture, biases, sliding windows, layers without positions, other
        scalings of positions, or an unknown key. All are listed.
    """
    path = Path(folder) / "config.json"
    schema.require((path.is_file(), f"{path}: no such file. Give a model's folder."))
    found = json_files.read_object(path)
    errors = _architecture_errors(found)
    if not errors:
        errors = _missing(found) + config_keys.unsupported(found)
    rope, faults = read_rope(found)
    schema.require(*((False, f"{path}: {line}") for line in errors + faults))
    return schema.build(ModelConfig, _settings(found, rope), str(path))


def _architecture_errors(found: Mapping[str, Any]) -> list[str]:
    known = config_keys.ARCHITECTURES
    kind, named = found.get("model_type"), found.get("architectures")
    if isinstance(kind, str) and kind in known and named in (None, [known[kind]]):
        return []
    return [
        f"`model_type` is {kind!r} with the `architectures` {named!r}: only "
        f"{', '.join(known.values())} are read."
    ]


def _missing(found: Mapping[str, Any]) -> list[str]:
    also = config_keys.ALSO_REQUIRED[found["model_type"]]
    wanted = {**config_keys.REQUIRED, **also}
    return [
        f"`{key}` must be a whole number, got {found.get(key)!r}."
        for key, kind in wanted.items()
        if type(found.get(key)) is not kind
    ]


def _settings(found: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    tied, eps = found.get("tie_word_embeddings"), found.get("rms_norm_eps")
    return {
        "dim": found["hidden_size"],
        "n_layers": found["num_hidden_layers"],
        "n_heads": found["num_attention_heads"],
        "n_kv_heads": found.get("num_key_value_heads"),
        "head_dim": found.get("head_dim"),
        "qk_norm": "gain" if found["model_type"] == "qwen3" else "none",
        "ffn_mult": found["intermediate_size"] / max(found["hidden_size"], 1),
        "vocab_size": found["vocab_size"],
        "max_seq_len": found["max_position_embeddings"],
        "weight_tied": False if tied is None else tied,
        "norm_eps": 1e-6 if eps is None else eps,
        **rope,
    }
