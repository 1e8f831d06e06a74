"""Counted operations of an update are those of its products."""

import jax
import jax.numpy as jnp
import pytest

import helpers
import nanochat_jax as nj
from nanochat_jax.optimizer import matrix_optimizer
from nanochat_jax.optimizer.flops import update_flops

PARAMS = {"w": jax.ShapeDtypeStruct((2, 96, 256), jnp.float32)}


def flops_of(config):
    return update_flops(config, PARAMS, matrix_axes={"w": nj.MatrixAxes(-2, -1)})


def counted_flops(config):
    tx = matrix_optimizer(config)
    state = jax.eval_shape(tx.init, PARAMS)
    update = lambda grads, state: tx.update(grads, state, grads)
    return helpers.count_product_flops(update, PARAMS, state)


@pytest.mark.parametrize("ns_dtype", ["float32", "bfloat16"])
def test_muon_counts_the_products_of_its_update(ns_dtype):
    config = nj.OptimizerConfig(ns_dtype=ns_dtype)
    assert counted_flops(config) == sum(flops_of(config).values())


def test_plain_galore_iterates_in_the_low_rank_space():
    kwargs = {"use_galore": True, "galore_rank": 24, "ns_dtype": "float32"}
    muon = flops_of(nj.OptimizerConfig(ns_dtype="float32"))
    joint = flops_of(nj.OptimizerConfig(**kwargs))
    plain = flops_of(nj.OptimizerConfig(galore_residual=0.0, **kwargs))
    assert joint["newton_schulz"] == muon["newton_schulz"]
    assert plain["newton_schulz"] < muon["newton_schulz"] / 8
    assert plain["projection"] == 2 * 4 * 96 * 256 * 24
    assert muon["projection"] == muon["refresh"] == 0
    often = nj.OptimizerConfig(galore_update_freq=20, **kwargs)
    more = flops_of(often)["refresh"]
    assert more == pytest.approx(10 * plain["refresh"], rel=1e-4)


def test_a_leaf_left_at_full_rank_counts_as_one():
    config = nj.OptimizerConfig(use_galore=True, galore_rank=96, ns_dtype="float32")
    expected = flops_of(nj.OptimizerConfig(ns_dtype="float32"))
    assert flops_of(config) == expected


@pytest.mark.parametrize("sides", ["short", "both"])
def test_preconditioning_counts_the_products_of_its_update_and_those_of_bases(sides):
    settings = {"ns_dtype": "float32", "precondition": sides}
    config = nj.OptimizerConfig(**settings, precondition_every=10**9)
    # Bases are computed in a branch, which is not counted.
    assert counted_flops(config) == sum(flops_of(config).values())
    often = flops_of(nj.OptimizerConfig(**settings, precondition_every=1))
    more = often["precondition"] - flops_of(config)["precondition"]
    sizes = [96, 256] if sides == "both" else [96]
    assert more == 2 * sum(5 * 2 * d**3 + 8 * d**3 // 3 for d in sizes)
