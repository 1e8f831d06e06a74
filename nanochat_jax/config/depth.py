"""Settings that follow from the depth of a model, where they are not set.

  dim             64 a layer, and heads of 64, so one head a layer. This is the aspect
                  ratio of nanochat; at 12 layers it is the shape of GPT-2 small.
  batch           32 sequences at 12 layers, as in configs/nano_125m.toml, and in
                  proportion to D^0.383 for D tokens of training (Bergsma et al. 2025,
                  "Power Lines"). D goes with the parameters (Hoffmann et al. 2022), so
                  with depth³, and the batch with depth^1.149. It is rounded to a power
                  of two, and above 8 sequences made of microbatches of 8.
  lr              0.02 at any depth: `muon_scale = "width"` makes updates of a fixed
                  spectral norm for the width of a matrix, under which the best rate
                  does not depend on it (Yang et al. 2023, "A Spectral Condition").
  fallback_lr     0.003 for AdamW at 12 layers, 0.0003 for Lion, and in proportion to
                  dim^-0.5, as in nanochat. At 4 layers it is 0.0052, where
                  configs/tiny_cpu.toml, for a model as wide, has 0.005.

Neither rate follows the batch, which changes too little with depth to matter.
"""

import math
from typing import Any

from nanochat_jax.config import schema

HEAD_DIM = 64
MICROBATCH = 8

_REFERENCE = 12
_SEQUENCES = 32
_BATCH_EXPONENT = 3 * 0.383

FALLBACK_LR = {"adamw": 3e-3, "lion": 3e-4}
"""Peak learning rates of AdamW and Lion, at 12 layers if they follow from depth."""


def derive(depth: int, fallback: str = "adamw") -> dict[str, Any]:
    """Returns the settings that follow from a depth, by their keys.

    Args:
      depth: Layers.
      fallback: Optimizer of embeddings, head and vectors.

    Raises:
      ValueError: If `depth` is not a whole number of at least 1.
    """
    schema.require(
        (
            isinstance(depth, int) and not isinstance(depth, bool) and depth >= 1,
            f"`depth` must be a whole number of at least 1, got {depth!r}.",
        )
    )
    relative = depth / _REFERENCE
    sequences = 2 ** round(math.log2(_SEQUENCES * relative**_BATCH_EXPONENT))
    microbatch = min(sequences, MICROBATCH)
    rate = FALLBACK_LR.get(str(fallback), FALLBACK_LR["adamw"]) / math.sqrt(relative)
    return {
        "dim": HEAD_DIM * depth,
        "n_layers": depth,
        "n_heads": depth,
        "batch_size": microbatch,
        "grad_accum_steps": sequences // microbatch,
        "lr": 0.02,
        "fallback_lr": float(f"{rate:.2g}"),
    }


def describe(depth: int, config: Any) -> str:
    """Describes the settings that follow from a depth, and those set otherwise.

    Args:
      depth: Layers.
      config: The settings in use.
    """
    derived = derive(depth, config.fallback)
    return schema.describe(f"Depth {depth}", derived, config)
