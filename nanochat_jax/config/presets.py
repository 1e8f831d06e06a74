"""Shapes of known models, to plan with: `plan --model 7b --mesh fsdp=64`."""

from typing import Any, Literal

ModelName = Literal["1b", "7b", "70b"]

# As such models are trained: blocks in a loop, recomputed, in bfloat16.
_TRAINED: dict[str, Any] = {
    "compute_dtype": "bfloat16",
    "loss_chunk": 0,
    "remat": True,
    "scan_layers": True,
    "vocab_size": 32_000,
    "weight_tied": False,
}

MODELS: dict[ModelName, dict[str, Any]] = {
    # TinyLlama 1.1B (Zhang et al. 2024).
    "1b": {
        **_TRAINED,
        "dim": 2048,
        "n_layers": 22,
        "n_heads": 32,
        "n_kv_heads": 4,
        "ffn_mult": 2.75,
        "max_seq_len": 2048,
    },
    # Llama 2 7B and 70B (Touvron et al. 2023).
    "7b": {
        **_TRAINED,
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "ffn_mult": 2.6875,
        "max_seq_len": 4096,
    },
    "70b": {
        **_TRAINED,
        "dim": 8192,
        "n_layers": 80,
        "n_heads": 64,
        "n_kv_heads": 8,
        "ffn_mult": 3.5,
        "max_seq_len": 4096,
    },
}
"""Settings of the model by its name."""
