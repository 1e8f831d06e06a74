"""Attention scores beyond a threshold are scaled down, head by head, and no others."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import keystr

from nanochat_jax.lm.model import clip_attention, gpt, largest_scores
from nanochat_jax.lm.training.run import make_run
from nanochat_jax.lm.training.step import compile_train_step, init_state
from tiny import MODEL, run_config

# Four query heads, of which two share a key.
CONFIG = dataclasses.replace(MODEL, qk_norm="none")
TOKENS = jax.random.randint(jax.random.key(0), (2, 16), 0, MODEL.vocab_size)


@functools.cache
def model(scanned):
    config = dataclasses.replace(CONFIG, scan_layers=scanned)
    graphdef, params = gpt.init(config, 0)
    louder = lambda path, x: x * (3 if "query" in keystr(path) else 1)
    params = jax.tree.map_with_path(louder, params)
    return params, jax.jit(lambda params: largest_scores(graphdef, params, TOKENS))


def _kernel(params, scanned, layer, name):
    blocks = params["blocks"]
    block = jax.tree.map(lambda x: x[layer], blocks) if scanned else blocks[layer]
    return block["attention"][name]["kernel"]


@pytest.mark.parametrize("scanned", [False, True])
def test_scores_of_heads_beyond_it_come_down_to_the_threshold(scanned):
    params, measure = model(scanned)
    before = measure(params)
    assert before.shape == (2, 4)
    threshold = float(np.sort(before[0])[1] + np.sort(before[0])[2]) / 2
    clipped = clip_attention(params, before, threshold)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, params)
    # What later layers read has changed, so only the first has these very scores.
    np.testing.assert_allclose(
        measure(clipped)[0], np.minimum(before[0], threshold), rtol=1e-5
    )


def test_the_largest_scores_are_those_of_attention():
    params, measure = model(scanned=False)
    x = params["embed"]["embedding"][TOKENS]
    x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + CONFIG.norm_eps)
    kernel = lambda name: _kernel(params, False, 0, name)
    heads = lambda name, n: (x @ kernel(name)).reshape(2, 16, n, CONFIG.head_size)
    # Rotation keeps the scores of a position with itself.
    same = heads("query", 4) * jnp.repeat(heads("key", 2), 2, axis=2)
    own = same.sum(-1).max((0, 1)) / CONFIG.head_size**0.5
    assert (measure(params)[0] >= own - 1e-5).all()
    chex.assert_trees_all_close(measure(params), model(scanned=True)[1](model(True)[0]))


def test_all_else_stays_as_it_is():
    params, measure = model(scanned=False)
    largest = measure(params).at[0, 0].set(50.0)  # shares a key with head 1
    clipped = clip_attention(params, largest, 20.0)
    changed = {
        keystr(path)
        for (path, x), y in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(clipped), strict=True
        )
        if (x != y).any()
    }
    name = "['blocks'][0]['attention']['{}']['kernel']"
    assert changed == {name.format("query"), name.format("key")}
    size = CONFIG.head_size
    for kind, heads in (("query", 2), ("key", 1)):
        x, y = (_kernel(p, False, 0, kind) for p in (params, clipped))
        chex.assert_trees_all_equal(x[:, heads * size :], y[:, heads * size :])
    unknown = clip_attention(params, jnp.zeros_like(largest), 20.0)
    chex.assert_trees_all_equal(unknown, params)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_run_clips_at_its_interval_and_logs_the_largest(in_backward):
    config = run_config(
        qk_norm="none",
        qk_clip=1e-3,
        qk_clip_interval=2,
        scan_layers=in_backward,
        update_in_backward=in_backward,
        total_steps=4,
    )
    run = make_run(config)
    step, state = compile_train_step(run), init_state(run)
    batch = jax.random.randint(jax.random.key(0), (1, 4, config.sequence + 1), 0, 64)
    logged = []
    measure = jax.jit(lambda p: largest_scores(run.graphdef, p, batch[0, :, :-1]))
    for done in range(1, 5):
        state, metrics = step(state, batch)
        logged.append(float(metrics["largest_score"]))
        if done % 2 == 0:
            assert measure(state.params).max() <= 1.001e-3
    assert logged[0] == logged[2] == 0 < 1e-3 < min(logged[1], logged[3])


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"`qk_clip` is for `qk_norm = \"none\"`"):
        run_config(qk_clip=100.0)
    with pytest.raises(ValueError, match="low bits"):
        run_config(
            qk_clip=100.0,
            qk_norm="none",
            param_dtype="bfloat16",
            weight_rounding="split",
        )
    run = make_run(run_config(qk_clip=100.0, qk_norm="none", freeze=("*/key",)))
    with pytest.raises(ValueError, match=r"frozen: .*\['key'\]\['kernel'\]"):
        compile_train_step(run)
