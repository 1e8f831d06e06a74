"""Shapes of known models, to plan with: `plan --model 7b --mesh fsdp=64`."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from nanochat_jax.config import schema

ModelName = Literal["1b", "7b", "70b"]

# How such models are trained: blocks in a loop, recomputed, in bfloat16.
_TRAINED: dict[str, Any] = {
    "compute_dtype": "bfloat16",
    "loss_chunk": 0,
    "remat": True,
    "scan_layers": True,
    "vocab_size": 32_000,
    "weight_tied": False,
}

MODELS: dict[str, dict[str, Any]] = {
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


def shape_of(model: str, mesh: Mapping[str, int]) -> dict[str, Any]:
    """Returns the settings that follow from the name of a model, by their keys.

    A microbatch is one sequence for each part in which `mesh` divides it.

    Args:
      model: Name of the model, a key of `MODELS`.
      mesh: Devices along the axes of a mesh.

    Raises:
      ValueError: If there is no such model.
    """
    schema.require(
        (model in MODELS, f"`model` must be one of {[*MODELS]}, got {model!r}.")
    )
    sequences = math.prod(mesh.get(axis, 1) for axis in ("data", "fsdp"))
    return {**MODELS[model], "batch_size": sequences}


def describe(model: str, config: Any) -> str:
    """Describes the settings that follow from a model's name, and those set otherwise.

    Args:
      model: Name of the model, a key of `MODELS`.
      config: The settings in use.
    """
    derived = shape_of(model, config.mesh)
    return schema.describe(f"Model {model}", derived, config)
