"""Fine-tune all weights of a Hugging Face model with a quarter of the usual state.

Run it with `python examples/finetune_hf.py`; it takes some seconds, and makes a tiny
random Qwen3 to train. `--model FOLDER --text FILE --output FOLDER` takes one of yours,
of Qwen3, Llama or Mistral. Weights are bfloat16, with 8 further bits each as state;
momentum is in 8 bits, or `--bits 4`. transformers loads the folder that it writes.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import optax

import nanochat_jax as nj
from nanochat_jax.config import ModelConfig
from nanochat_jax.lm import huggingface
from nanochat_jax.lm.data import load_tokenizer
from nanochat_jax.lm.model import build_optimizer, gpt, next_token_loss

STEPS, LENGTH, BATCH = 40, 64, 8
TINY = ModelConfig(dim=64, n_layers=2, n_heads=2, head_dim=64, qk_norm="gain")


def finetune(model: Path, text: str, output: Path, bits: int) -> dict[str, float]:
    config = huggingface.read_config(model)
    config = dataclasses.replace(config, param_dtype="bfloat16", scan_layers=True)
    params, file = huggingface.read_weights(model, config), model / "tokenizer.json"
    settings = nj.OptimizerConfig(
        use_8bit_optim=True, quant_bits=bits, weight_rounding="split", lr=4e-3,
        fallback_lr=1e-3, total_steps=STEPS,
    )  # fmt: skip
    tx, graphdef = build_optimizer(settings, params), gpt.abstract_model(config)[0]
    loss = jax.jit(lambda params, ids: next_token_loss(graphdef, params, ids))

    def take(params, state, ids):
        updates, state = tx.update(jax.grad(loss)(params, ids), state, params)
        return optax.apply_updates(params, updates), state

    state, step = tx.init(params), jax.jit(take, donate_argnums=(0, 1))
    ids, rng = load_tokenizer(file).encode(text), np.random.default_rng(0)
    starts = rng.integers(len(ids) - LENGTH, size=(STEPS, BATCH, 1))
    batches = ids[starts + np.arange(LENGTH + 1)].astype(np.int32)
    first = float(loss(params, batches[0]))
    for batch in batches:
        params, state = step(params, state, batch)
    last = float(loss(params, batches[0]))
    huggingface.write_folder(output, config, params, tokenizer=file)
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    adamw = 8 * optax.tree.size(params)
    print(f"loss {first:.3f} -> {last:.3f} in {STEPS} steps; written to {output}")
    print(f"state {held:,} bytes; AdamW in float32 takes {adamw:,}")
    return {"first_loss": first, "last_loss": last, "state": held, "adamw": adamw}


def main(args: Sequence[str] = ()) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="Fine-tunes a model.")
    for flag in ("--model", "--text", "--output"):
        parser.add_argument(flag, type=Path)
    parser.add_argument("--bits", type=int, default=8, choices=(8, 4))
    given = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as folder:
        model, output = given.model, given.output or Path(folder) / "out"
        if model is None:  # a random one, whose tokens are bytes
            model, (_, params) = Path(folder) / "tiny", gpt.init(TINY, seed=0)
            huggingface.write_folder(model, TINY, params, tokenizer=None)
        text = (given.text or Path(__file__)).read_text(encoding="utf-8")
        return finetune(model, text, output, given.bits)


if __name__ == "__main__":
    main(sys.argv[1:])
