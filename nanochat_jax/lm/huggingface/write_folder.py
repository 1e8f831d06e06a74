"""A folder that `transformers` loads: settings, weights and tokenizer."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nanochat_jax.config import ModelConfig, schema
from nanochat_jax.lm.huggingface import json_files, tokenizers
from nanochat_jax.lm.huggingface.rope import write_rope
from nanochat_jax.lm.huggingface.write_weights import write_weights
from nanochat_jax.lm.model import Params
from nanochat_jax.lm.runtime import making_folder, new_folder, why_not_new

DTYPES = ("float32", "bfloat16", "float16")
"""Types in which weights are written."""


def write_folder(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    tokenizer: str | Path | None,
    end_token: str | None = None,
    dtype: str | None = None,
    max_part_bytes: int = 5_000_000_000,
    latent: bool = False,
) -> None:
    """Writes a model as `transformers.AutoModelForCausalLM` loads it.

    It is a Qwen3, with gains of one where the model has none, or a Llama if queries and
    keys are not normalised. The folder gets its name when all of it is written.

    Example:
      >>> from nanochat_jax.lm.model import gpt
      >>> config = ModelConfig(dim=16, n_layers=1, n_heads=2)
      >>> params = gpt.init(config, 0)[1]
      >>> write_folder("mine", config, params, tokenizer=None)
      >>> (Path("mine") / "model.safetensors").exists()
      True

    Args:
      folder: Folder to write; it must be new or empty.
      config: Settings of the model.
      params: Its parameters, as `config` has them.
      tokenizer: Its `tokenizer.json`; `None` for bytes.
      end_token: Token that ends a document, as for `load_tokenizer`.
      dtype: Type of the weights, "float32", "bfloat16" or "float16"; that of `params`
        if not given.
      max_part_bytes: Most bytes of a file of weights; more are written in parts.
      latent: Whether a ternary model is written as the floats that it rounds in use,
        which give other logits.

    Raises:
      ValueError: If the folder has files, the model is ternary and `latent` is not set,
        the tokenizer cannot be read or has more ids than the model, or the type is none
        of these. Nothing was written.
    """
    used = dtype or str(jax.tree.leaves(params)[0].dtype.name)
    check_writable(folder, config, latent=latent, dtype=used)
    written = tokenizers.to_write(tokenizer, end_token, config.vocab_size)
    with making_folder(new_folder(folder)) as made:
        settings = _config(config, used, written.generation["eos_token_id"])
        json_files.write_object(made / "config.json", settings)
        written.write(made)
        write_weights(made, config, params, jnp.dtype(used), max_part_bytes)


def check_writable(
    folder: str | Path,
    config: ModelConfig,
    *,
    latent: bool = False,
    dtype: str | None = None,
) -> None:
    """Refuses a folder that has files, and a model that cannot be written.

    Args:
      folder: Folder to write.
      config: Settings of the model.
      latent: Whether a ternary model is written as the floats that it rounds.
      dtype: Type of the weights, if it is chosen.

    Raises:
      ValueError: If it is refused; all reasons are listed.
    """
    taken = why_not_new(folder)
    schema.require(
        (taken is None, taken or ""),
        (
            latent or not config.ternary,
            "the model is ternary, which transformers does not compute: it rounds "
            "kernels to -1, 0 and 1 and their inputs to 8 bits. `--latent` writes the "
            "floats that it rounds, as a model with other logits.",
        ),
        (
            dtype is None or dtype in DTYPES,
            f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.",
        ),
    )


def _config(config: ModelConfig, dtype: str, ends: Any) -> dict[str, Any]:
    """Returns the content of `config.json`, with every key that has another default."""
    qwen3 = config.qk_norm != "none"
    own = {"use_sliding_window": False} if qwen3 else {"mlp_bias": False}
    return {
        "architectures": ["Qwen3ForCausalLM" if qwen3 else "LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "eos_token_id": ends,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "initializer_range": 0.02,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.max_seq_len,
        "model_type": "qwen3" if qwen3 else "llama",
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": write_rope(config.rope_theta, config.rope_scaling),
        "tie_word_embeddings": config.weight_tied,
        "vocab_size": config.vocab_size,
        **own,
    }
