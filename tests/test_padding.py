"""What fills the vocabulary up to a multiple has no part in what a model does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from nanochat_jax.lm.checkpoints import weights_file
from nanochat_jax.lm.model import gpt, next_token_loss
from nanochat_jax.lm.model.sampling import generate

CONFIG = dataclasses.replace(tiny.MODEL, n_layers=1, vocab_size=37, pad_vocab_to=32)
CASES = [{}, {"weight_tied": False}, {"loss_chunk": 8}]
TOKENS = np.random.default_rng(0).integers(0, 37, (2, 17))


@functools.cache
def built(**values):
    """A padded model whose padding is large, and the same without any."""
    config = dataclasses.replace(CONFIG, **values)
    graphdef, params = gpt.init(config, 0)
    params["embed"]["embedding"] = params["embed"]["embedding"].at[37:].set(9.0)
    plain = dataclasses.replace(config, pad_vocab_to=1)
    bare = gpt.without_padding(config, params)
    return (config, graphdef, params), (plain, gpt.init(plain, 0)[0], bare)


@pytest.mark.parametrize("values", CASES, ids=str)
def test_losses_and_gradients_are_those_without(values):
    (config, graphdef, params), (_, plain_def, bare) = built(**values)
    assert params["embed"]["embedding"].shape == (64, 32) == (config.table_size, 32)
    assert bare["embed"]["embedding"].shape == (37, 32)
    wanted, d_wanted = loss_and_grads(plain_def, bare)
    found, d_found = loss_and_grads(graphdef, params)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    cut = gpt.without_padding(config, d_found)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), cut, d_wanted
    )
    size = lambda tree: sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))
    np.testing.assert_allclose(size(d_found), size(cut), rtol=1e-6)  # padding has none


def loss_and_grads(graphdef, params):
    loss = lambda params: next_token_loss(graphdef, params, jnp.asarray(TOKENS))
    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("values", CASES[:2], ids=str)
def test_logits_and_samples_are_those_without(values):
    (config, graphdef, params), (plain, plain_def, bare) = built(**values)
    logits, wanted = (
        jax.jit(functools.partial(gpt.apply, structure))(params, TOKENS)
        for structure, params in ((graphdef, params), (plain_def, bare))
    )
    assert logits.shape == (2, 17, 37)
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-6)
    options = {"max_tokens": 8, "temperature": 3.0, "top_k": 50}
    assert [*generate(graphdef, params, config, [1, 2], **options)] == [
        *generate(plain_def, bare, plain, [1, 2], **options)
    ]


def test_exports_have_none(tmp_path):
    (config, _, params), (plain, _, bare) = built(weight_tied=False)
    weights_file.save(tmp_path / "w.safetensors", config, params, step=1, tokenizer="t")
    found, weights = weights_file.load(tmp_path / "w.safetensors")
    assert found == plain
    jax.tree.map(np.testing.assert_array_equal, weights, bare)


def test_a_multiple_takes_no_padding():
    assert dataclasses.replace(CONFIG, vocab_size=64).table_size == 64
    with pytest.raises(ValueError, match="`pad_vocab_to` must be at least 1"):
        dataclasses.replace(CONFIG, pad_vocab_to=0)
