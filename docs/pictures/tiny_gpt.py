"""Gradients of a small GPT in training, which the pictures are made from."""

import functools

import jax
import numpy as np
import optax

import nanochat_jax as nj
from nanochat_jax.config import ModelConfig
from nanochat_jax.lm import data, model
from nanochat_jax.lm.model import gpt

STEPS = 120
MODEL = ModelConfig(dim=128, n_layers=2, n_heads=4, vocab_size=256, max_seq_len=64)


@functools.cache
def gradients(steps: int = STEPS) -> dict[str, np.ndarray]:
    """Trains the GPT on Python's standard library, and keeps some of its gradients.

    Args:
      steps: Steps of training, each of 16 sequences of 64 bytes.

    Returns:
      Gradients of two kernels of the last block by name, `[steps, fan_in, fan_out]`.
    """
    tokens = data.load_corpus(
        "stdlib", tokenizer=data.load_tokenizer(None), vocab_size=256
    ).train
    batches = data.Batches(tokens, batch_size=16, seq_len=64, seed=0)
    graphdef, params = gpt.init(MODEL, 0)
    tx = nj.muon(0.02)

    @jax.jit
    def step(params, state, batch):
        loss = lambda params: model.next_token_loss(graphdef, params, batch)
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, _kept(grads)

    state, kept = tx.init(params), []
    for i in range(steps):
        params, state, of_step = step(params, state, batches(i))
        kept.append(jax.device_get(of_step))
    return {name: np.stack([of_step[name] for of_step in kept]) for name in kept[0]}


def _kept(grads: optax.Updates) -> dict[str, jax.Array]:
    block = grads["blocks"][MODEL.n_layers - 1]
    return {
        "attention, value": block["attention"]["value"]["kernel"],
        "feed-forward, up": block["ffn"]["up"]["kernel"],
    }
