"""Ternary layers: what is rounded, to what, and what gradients make of it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nanochat_jax as nj
import tiny
from nanochat_jax.config import ModelConfig
from nanochat_jax.lm.checkpoints import weights_file
from nanochat_jax.lm.model import gpt, next_token_loss
from nanochat_jax.lm.model.functions import count_flops_per_token
from nanochat_jax.lm.model.ternary import (
    TernaryLinear,
    round_activations,
    ternarize,
)

PLAIN = tiny.MODEL
TERNARY = dataclasses.replace(PLAIN, ternary=True, group_size=16)
TOKENS = np.arange(32).reshape(2, 16)


def kernel(rows=40, columns=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, columns), np.float32)


@functools.cache
def initial(config):
    return gpt.init(config, 0)


def logits(config, params, tokens=TOKENS):
    return jax.jit(functools.partial(gpt.apply, initial(config)[0]))(params, tokens)


# Rounding


@pytest.mark.parametrize("group_size", [1, 16, 40, 128])
def test_weights_are_signs_times_the_mean_size_of_their_group(group_size):
    w = kernel()
    signs, scales = map(np.asarray, ternarize(w, group_size))
    assert set(np.unique(signs)) <= {-1, 0, 1}
    for start in range(0, len(w), group_size):  # the last of 16 has but 8
        group = slice(start, start + group_size)
        mean = np.abs(w[group]).mean(axis=0)
        np.testing.assert_allclose(
            scales[group], np.broadcast_to(mean, w[group].shape), rtol=1e-6
        )
    near = np.abs(np.abs(w) / scales - 0.5) > 1e-5
    expected = np.where(np.abs(w) > 0.5 * scales, np.sign(w), 0)
    np.testing.assert_array_equal(signs[near], expected[near])


def test_groups_do_not_know_of_each_other():
    w = kernel()
    louder = np.concatenate([w[:16], 8 * w[16:]])
    before, after = ternarize(w, 16), ternarize(louder, 16)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1][:16], after[1][:16])
    np.testing.assert_array_equal(8 * before[1][16:], after[1][16:])


def test_zeros_stay_zeros():
    signs, scales = ternarize(jnp.zeros((8, 3)), 4)
    assert not signs.any() and not scales.any()
    assert not round_activations(jnp.zeros((2, 8))).any()


def test_activations_are_on_255_levels_of_their_own_row():
    x = kernel(7, 300) * np.logspace(-3, 3, 7, dtype=np.float32)[:, None]
    rounded = np.asarray(round_activations(x))
    steps = np.abs(x).max(axis=1, keepdims=True) / 127
    levels = rounded / steps
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
    assert np.abs(levels).max() <= 127.001
    assert (np.abs(rounded - x) <= 0.501 * steps).all()


# The layer


def layer(rows=40, columns=6, dtype="float32"):
    return TernaryLinear(rows, columns, group_size=16, dtype=dtype, rngs=nnx.Rngs(0))


def test_the_layer_multiplies_by_exactly_the_rounded_weights():
    ternary = layer()
    signs, scales = ternarize(ternary.kernel[...], 16)
    np.testing.assert_array_equal(ternary(jnp.eye(40)), signs * scales)


def test_gradients_pass_straight_through():
    x, g = kernel(5, 40), kernel(5, 6, seed=1)
    graphdef, state = nnx.split(layer())
    product = lambda x, state: jnp.sum(nnx.merge(graphdef, state)(x) * g)
    d_x, d_state = jax.grad(product, (0, 1))(jnp.asarray(x), state)
    w, d_w = state["kernel"][...], d_state["kernel"][...]
    signs, scales = ternarize(w, 16)
    np.testing.assert_allclose(d_w, round_activations(x).T @ g, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_x, g @ (signs * scales).T, rtol=1e-5, atol=1e-5)


def test_products_are_in_the_type_of_the_layer_and_gradients_in_that_of_the_kernel():
    ternary = layer(dtype=jnp.bfloat16)
    x = jnp.asarray(kernel(5, 40), jnp.bfloat16)
    assert ternary(x).dtype == jnp.bfloat16
    assert ternary.kernel[...].dtype == jnp.float32
    near = layer()(x.astype(jnp.float32))
    np.testing.assert_allclose(ternary(x).astype(jnp.float32), near, atol=0.1)


# The model


def test_a_ternary_model_has_the_parameters_and_labels_of_a_plain_one():
    plain, ternary = initial(PLAIN)[1], initial(TERNARY)[1]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), plain, ternary)
    assert all(jax.tree.leaves(same))
    assert nj.label_params(plain) == nj.label_params(ternary)
    count = count_flops_per_token
    assert count(PLAIN) == count(TERNARY)


def test_the_kernels_of_blocks_alone_are_rounded():
    """With kernels that are ternary already only activations are rounded, by 8 bits."""

    def signs(path, x):
        own = "blocks" in str(path) and "kernel" in str(path)
        return jnp.where(x < 0, -1.0, 1.0) / 8 if own else x

    params = jax.tree.map_with_path(signs, initial(PLAIN)[1])
    plain, ternary = logits(PLAIN, params), logits(TERNARY, params)
    scale = np.abs(plain).max()
    assert 1e-5 * scale < np.abs(plain - ternary).max() < 0.05 * scale
    rounded = logits(TERNARY, initial(TERNARY)[1]) - logits(PLAIN, initial(PLAIN)[1])
    assert jnp.abs(rounded).max() > 1e-4


def test_training_with_quantised_momentum_lowers_the_loss():
    graphdef, params = initial(dataclasses.replace(TERNARY, n_layers=1))
    config = nj.OptimizerConfig(
        use_8bit_optim=True, quant_min_size=0, lr=0.02, total_steps=60
    )
    tx = nj.build_optimizer(config, params)
    batch = jax.random.randint(jax.random.key(0), (2, 17), 0, 61)

    @jax.jit
    def step(params, state):
        loss = functools.partial(next_token_loss, graphdef)
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(30):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]


def test_an_export_has_the_latent_weights_and_says_so(tmp_path):
    params = initial(TERNARY)[1]
    path = tmp_path / "w.safetensors"
    weights_file.save(path, TERNARY, params, step=0, tokenizer="bytes")
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["kernels"] == "latent"
    assert record["config"]["ternary"] and record["config"]["group_size"] == 16
    config, loaded = weights_file.load(path)
    assert config == TERNARY
    np.testing.assert_array_equal(logits(TERNARY, loaded), logits(TERNARY, params))
    weights_file.save(path, PLAIN, params, step=0, tokenizer="bytes")
    assert json.loads(path.with_suffix(".json").read_text())["kernels"] == "plain"


def test_a_group_has_at_least_one_member():
    with pytest.raises(ValueError, match="`group_size` must be at least 1, got 0"):
        ModelConfig(ternary=True, group_size=0)
