"""Keys of a `config.json`: those that are read, and those that change no number.

A key in neither list may change what the model computes, so it is refused by name.
"""

from collections.abc import Mapping
from typing import Any

ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
"""Architectures that are read, by `model_type`."""

REQUIRED = {
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "vocab_size": int,
    "max_position_embeddings": int,
}
"""Keys that must be given, and their types."""

# Left out, these are 32 and 128 or 8 for transformers, whatever the width.
ALSO_REQUIRED = {
    "qwen3": {"num_key_value_heads": int, "head_dim": int},
    "mistral": {"num_key_value_heads": int},
    "llama": {},
}
"""Further keys that must be given, by `model_type`."""

_READ = {
    *REQUIRED, "architectures", "head_dim", "model_type", "num_key_value_heads",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "tie_word_embeddings",
}  # fmt: skip

_HARMLESS = {
    "_attn_implementation_autoset", "_name_or_path", "attn_implementation",
    "bos_token_id", "dtype", "eos_token_id", "id2label", "initializer_range",
    "is_llama_config", "label2id", "max_window_layers", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "return_dict",
    "tokenizer_class", "torch_dtype", "transformers.js_config",
    "transformers_version", "unk_token_id", "unsloth_fixed", "unsloth_version",
    "use_cache",
}  # fmt: skip

# Keys with one value at which they change nothing, and what they are otherwise.
_NEUTRAL: dict[str, tuple[Any, str]] = {
    "attention_bias": (False, "biases of attention"),
    "attention_dropout": (0, "dropout of attention"),
    "hidden_act": ("silu", "another activation"),
    "mlp_bias": (False, "biases of the feed-forward layer"),
    "partial_rotary_factor": (1, "heads rotated in part"),
    "rope_interleaved": (False, "heads rotated by neighbouring entries"),
    "use_sliding_window": (False, "a sliding window"),
}


def unsupported(config: Mapping[str, Any]) -> list[str]:
    """Returns a line for each key that asks for what is not computed here.

    Args:
      config: Content of a `config.json`.
    """
    errors = []
    if config.get("model_type") == "mistral" and "sliding_window" not in config:
        errors += _sliding_window(4096, config)  # what transformers takes it for
    for key, value in sorted(config.items()):
        known = _READ | _HARMLESS | _NEUTRAL.keys() | _SPECIAL.keys()
        if value is None:  # not in use
            continue
        if key in _NEUTRAL and value != _NEUTRAL[key][0]:
            neutral, meaning = _NEUTRAL[key]
            errors.append(f"`{key}` is {value!r}: {meaning}; only {neutral!r} is read.")
        elif key in _SPECIAL:
            errors += _SPECIAL[key](value, config)
        elif key not in known:
            errors.append(
                f"`{key}` is {value!r}: an unknown key, which may change the numbers. "
                "Delete it from a copy of the folder if it does not."
            )
    return errors


def _sliding_window(value: Any, config: Mapping[str, Any]) -> list[str]:
    length = config.get("max_position_embeddings")
    # Qwen3 has a switch besides the size of the window.
    off = config.get("model_type") == "qwen3" and not config.get("use_sliding_window")
    if off or (isinstance(value, int) and isinstance(length, int) and value >= length):
        return []
    return [
        f"`sliding_window` is {value!r}, below `max_position_embeddings`, {length}. "
        "For sequences within the window, set it to null and "
        f"`max_position_embeddings` to {value} in a copy of the folder."
    ]


def _layer_types(value: Any, config: Mapping[str, Any]) -> list[str]:
    kinds = value if isinstance(value, list) else [value]
    others = sorted({str(kind) for kind in kinds} - {"full_attention"})
    return [f"`layer_types` has {', '.join(others)}: only full_attention is read."] * (
        bool(others)
    )


def _no_rope(value: Any, config: Mapping[str, Any]) -> list[str]:
    # 1 marks a layer with rotary positions.
    kept = isinstance(value, list) and all(x == 1 for x in value)
    return [] if kept else [f"`no_rope_layers` is {value!r}: layers without positions."]


def _quantized(value: Any, config: Mapping[str, Any]) -> list[str]:
    method = value.get("quant_method", value) if isinstance(value, dict) else value
    return [
        f"`quantization_config` is {method!r}: the weights are quantised. Take the "
        "folder of the model before that."
    ]


def _custom_code(value: Any, config: Mapping[str, Any]) -> list[str]:
    return [f"`auto_map` is {value!r}: the model is computed by code of its own."]


_SPECIAL = {
    "auto_map": _custom_code,
    "layer_types": _layer_types,
    "no_rope_layers": _no_rope,
    "quantization_config": _quantized,
    "sliding_window": _sliding_window,
}
