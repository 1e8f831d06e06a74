"""Counted operations of an update are those of its products."""

import jax
import jax.numpy as jnp
import pytest

import helpers
import nanochat_jax as nj
from nanochat_jax.flops import update_flops
from nanochat_jax.optimizer import matrix_optimizer

PARAMS = {"w": jax.ShapeDtypeStruct((2, 96, 256), jnp.float32)}


@pytest.mark.parametrize("ns_dtype", ["float32", "bfloat16"])
def test_muon_counts_the_products_of_its_update(ns_dtype):
    config = nj.OptimizerConfig(ns_dtype=ns_dtype)
    tx = matrix_optimizer(config)
    state = jax.eval_shape(tx.init, PARAMS)
    update = lambda grads, state: tx.update(grads, state, grads)
    counted = helpers.count_product_flops(update, PARAMS, state)
    assert counted == sum(update_flops(config, PARAMS).values())


def test_plain_galore_iterates_in_the_low_rank_space():
    kwargs = {"use_galore": True, "galore_rank": 24, "ns_dtype": "float32"}
    muon = update_flops(nj.OptimizerConfig(ns_dtype="float32"), PARAMS)
    joint = update_flops(nj.OptimizerConfig(**kwargs), PARAMS)
    plain = update_flops(nj.OptimizerConfig(galore_residual=0.0, **kwargs), PARAMS)
    assert joint["newton_schulz"] == muon["newton_schulz"]
    assert plain["newton_schulz"] < muon["newton_schulz"] / 8
    assert plain["projection"] == 2 * 4 * 96 * 256 * 24
    assert muon["projection"] == muon["refresh"] == 0
    often = nj.OptimizerConfig(galore_update_freq=20, **kwargs)
    more = update_flops(often, PARAMS)["refresh"]
    assert more == pytest.approx(10 * plain["refresh"], rel=1e-4)


def test_a_leaf_left_at_full_rank_counts_as_one():
    config = nj.OptimizerConfig(use_galore=True, galore_rank=96, ns_dtype="float32")
    expected = update_flops(nj.OptimizerConfig(ns_dtype="float32"), PARAMS)
    assert update_flops(config, PARAMS) == expected
