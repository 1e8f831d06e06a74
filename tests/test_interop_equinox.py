"""Equinox modules are trees of parameters, with `None` for what is no array."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import pytest

import helpers
import nanochat_jax as nj
import network

eqx = pytest.importorskip("equinox", reason="equinox is missing: `make test` has it")


class Embed(eqx.Module):
    embedding: jax.Array


class Layer(eqx.Module):
    """A kernel `(in, out)`, as in `network`; Equinox's own are `(out, in)`."""

    kernel: jax.Array
    bias: jax.Array | None
    activation: Callable

    def __call__(self, x):
        x = x @ self.kernel
        return self.activation(x if self.bias is None else x + self.bias[None])


class Network(eqx.Module):
    embed: Embed
    up: Layer
    down: Layer
    name: str
    width: int = eqx.field(static=True)

    def __init__(self, params):
        self.embed = Embed(**params["embed"])
        self.up = Layer(**params["up"], activation=jnp.tanh)
        self.down = Layer(**params["down"], bias=None, activation=lambda x: x)
        self.name, self.width = "network", 8

    def __call__(self, tokens):
        return self.down(self.up(self.embed.embedding[tokens]))


def as_dict(model):
    return {name: vars(getattr(model, name)) for name in ("embed", "up", "down")}


@network.every
def test_a_module_is_trained_as_optax_trains_its_arrays(name):
    model = start = Network(network.init())
    arrays = lambda model: eqx.filter(model, eqx.is_array)
    params = arrays(model)
    assert params.name is params.down.bias is params.up.activation is None
    tx = network.optimizer(name, params)
    state = tx.init(params)
    wanted = network.train(
        tx, jax.jit(tx.update), params, lambda model: network.loss(as_dict(model))
    )

    @eqx.filter_jit
    def step(model, state):
        loss = lambda model: jnp.mean((model(network.TOKENS) - 1) ** 2)
        grads = eqx.filter_grad(loss)(model)
        updates, state = tx.update(grads, state, arrays(model))
        return eqx.apply_updates(model, updates), state

    for _ in range(network.STEPS):
        model, state = step(model, state)
    network.assert_trained(arrays(model), arrays(wanted), arrays(start))
    assert (model.name, model.down.bias) == ("network", None)


def test_parameters_of_equinox_have_their_labels_and_their_bytes():
    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        mlp: eqx.nn.MLP
        norm: eqx.nn.LayerNorm
        head: eqx.nn.Linear

        def __init__(self, key):
            self.embed = eqx.nn.Embedding(16, 8, key=key)
            self.mlp = eqx.nn.MLP(8, 8, 24, depth=1, key=key)
            self.norm = eqx.nn.LayerNorm(8)
            self.head = eqx.nn.Linear(8, 16, use_bias=False, key=key)

    params = eqx.filter(Model(jax.random.key(0)), eqx.is_inexact_array)
    labels = nj.label_params(params)
    assert labels.embed.weight == "embedding"
    assert [layer.weight for layer in labels.mlp.layers] == ["matrix"] * 2
    assert [layer.bias for layer in labels.mlp.layers] == ["vector"] * 2
    assert (labels.norm.weight, labels.head.weight) == ("vector", "head")
    tx = network.optimizer("galore_8bit", params)
    held = sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))
    report = nj.memory_report(tx, params)
    assert report.total_bytes == held
    assert report.matrix_params == 2 * 8 * 24
    row = {row.field: row.bytes for row in report.rows if row.label == "matrix"}
    assert row["momentum"] == 2 * 5 * 24


def test_partitioned_modules_carry_frozen_arrays_past_the_transform():
    """With `eqx.partition`, as one trains a part of a model."""
    model = Network(network.init())
    spec = jax.tree.map(lambda _: False, model)
    spec = eqx.tree_at(lambda tree: tree.up.kernel, spec, replace=True)
    trained, frozen = eqx.partition(model, spec)
    tx = optax.chain(helpers.quantized(helpers.muon(), helpers.INT8), optax.sgd(0.1))
    loss = lambda trained: jnp.mean((eqx.combine(trained, frozen)(network.TOKENS)) ** 2)
    grads = eqx.filter_grad(loss)(trained)
    updates, _ = tx.update(grads, tx.init(trained), trained)
    kernel = {"kernel": grads.up.kernel}
    expected, _ = tx.update(kernel, tx.init(kernel), kernel)
    helpers.assert_close(updates.up.kernel, expected["kernel"], atol=1e-4)
    moved = eqx.apply_updates(eqx.combine(trained, frozen), updates)
    assert jnp.array_equal(moved.down.kernel, model.down.kernel)
    assert not jnp.array_equal(moved.up.kernel, model.up.kernel)
