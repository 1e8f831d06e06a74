"""A step with our states is exported and runs as it did."""

import chex
import jax
import jax.numpy as jnp
import optax

import nanochat_jax as nj

PARAMS = {"up": {"kernel": jnp.ones((8, 24)), "bias": jnp.ones(24)}}


def test_a_compiled_step_is_saved_and_loaded():
    tx = optax.inject_hyperparams(nj.muon, static_args=nj.MUON_STATIC)(
        learning_rate=0.02, bits=8, rank=4, grad_clip=1.0, min_size=1
    )
    state = tx.init(PARAMS)
    nj.register_for_export()
    nj.register_for_export()
    exported = jax.export.export(jax.jit(tx.update))(PARAMS, state, PARAMS)
    loaded = jax.export.deserialize(exported.serialize())
    found = loaded.call(PARAMS, state, PARAMS)
    chex.assert_trees_all_close(found, jax.jit(tx.update)(PARAMS, state, PARAMS))


def test_states_of_ours_and_of_optax_are_registered():
    nj.register_for_export()
    low_rank = nj.galore(nj.momentum(bias_correction=True), 4)
    tx = optax.chain(
        optax.masked(nj.quantize_state(low_rank, {"momentum": nj.Int8()}), True),
        optax.MultiSteps(optax.adam(0.1), 2),
    )
    state = jax.jit(tx.init)(PARAMS)
    exported = jax.export.export(jax.jit(lambda state: state))(state)
    assert jax.tree.structure(
        jax.export.deserialize(exported.serialize()).call(state)
    ) == jax.tree.structure(state)
