"""The small model and the small run that tests vary.

Tests of one process that share shapes share what is compiled for them.
"""

import json

from nanochat_jax.config import Config, ModelConfig

MODEL = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=61, max_seq_len=16
)
RUN = {
    "dim": 32, "n_layers": 1, "n_heads": 2, "ffn_mult": 2.0, "vocab_size": 64,
    "max_seq_len": 16, "dataset": "synthetic", "batch_size": 4, "eval_batches": 1,
    "galore_rank": 8, "quant_min_size": 0, "ns_dtype": "float32",
}  # fmt: skip


def run_config(**values):
    """Returns the settings of the small run, with others in place of some."""
    return Config(**RUN | values)


def write_config(folder, **values):
    """Writes these settings as TOML, and returns the path."""
    path = folder / "tiny.toml"
    lines = [f"{key} = {json.dumps(x)}\n" for key, x in (RUN | values).items()]
    path.write_text("".join(lines))
    return path
