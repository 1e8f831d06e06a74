"""Flax holds our variants as it holds Optax's own, in Linen, NNX and msgpack."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

import helpers
import network

pytest.importorskip("flax")
from flax import linen, nnx, serialization
from flax.training.train_state import TrainState

import nanochat_jax as nj

every = network.every
BOTH = ["galore_8bit", "by hand"]  # their states are least like the parameters
AXES = {"embed": ("data", None), "up": (None, "data"), "down": (None, "data")}


class Linen(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(16, 8, name="embed")(tokens)
        x = linen.tanh(linen.Dense(24, name="up")(x))
        return linen.Dense(8, use_bias=False, name="down")(x)


class Nnx(nnx.Module):
    """The network; with a mesh, its matrices say how they lie on it."""

    def __init__(self, rngs, mesh=None):
        mark = lambda name: {"out_sharding": AXES[name]} if mesh else {}
        self.embed = nnx.Embed(16, 8, rngs=rngs, embedding_metadata=mark("embed"))
        self.up = nnx.Linear(8, 24, rngs=rngs, kernel_metadata=mark("up"))
        self.down = nnx.Linear(
            24, 8, use_bias=False, rngs=rngs, kernel_metadata=mark("down")
        )
        self.dropout = nnx.Dropout(0.0, rngs=rngs)  # holds variables that are no Param
        self.calls = nnx.Variable(jnp.zeros([], jnp.int32))

    def __call__(self, tokens):
        self.calls[...] += 1
        x = nnx.tanh(self.up(self.embed(tokens)))
        return self.down(self.dropout(x))


@every
def test_linen_train_state_trains_as_optax_does(name):
    params, apply = network.init(), Linen().apply
    loss = lambda p: jnp.mean((apply({"params": p}, network.TOKENS) - 1) ** 2)
    tx = network.optimizer(name, params)
    state = TrainState.create(apply_fn=apply, params=params, tx=tx)
    step = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params)))
    for _ in range(network.STEPS):
        state = step(state)
    assert state.step == network.STEPS
    network.assert_trained(state.params, network.trained(name), network.init())


def train_nnx(name, mesh=None):
    """Trains the NNX network as users do; returns it and its optimizer."""
    model = Nnx(nnx.Rngs(0), mesh)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    place = lambda new, old: jax.device_put(new, old.sharding)
    nnx.update(model, jax.tree.map(place, network.init(), params))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    tx = network.optimizer(name, params)
    if name == "by hand":
        tx = nj.for_nnx(tx)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((model(network.TOKENS) - 1) ** 2)
        wrt = nnx.DiffState(0, nnx.Param)
        optimizer.update(model, nnx.grad(loss, argnums=wrt)(model))

    for _ in range(network.STEPS):
        step(model, optimizer)
    return model, optimizer


def check_nnx(name, mesh=None):
    """Asserts that network and state are those of plain Optax; returns the network."""
    context = jax.set_mesh(mesh) if mesh else contextlib.nullcontext()
    with context:
        model, optimizer = train_nnx(name, mesh)
        placed = nnx.as_pure(nnx.state(model, nnx.Param))
        state = nnx.as_pure(optimizer.opt_state)
        # Of matrices that have owners among several devices, state is kept in stacks.
        like = jax.eval_shape(network.optimizer(name, placed).init, placed)
    params = jax.device_get(nnx.to_pure_dict(placed))
    assert model.calls[...] == optimizer.step[...] == network.STEPS
    network.assert_trained(params, network.trained(name), network.init())
    sizes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert sizes(state) == sizes(like)
    return model


@every
def test_nnx_optimizer_trains_as_optax_does(name):
    check_nnx(name)


def auto_mesh(devices):
    auto = jax.sharding.AxisType.Auto
    return jax.make_mesh((devices,), ("data",), axis_types=(auto,))


@pytest.mark.parametrize("name", BOTH)
def test_nnx_optimizer_trains_under_a_mesh(name):
    check_nnx(name, auto_mesh(1))


def test_nnx_optimizer_trains_on_four_devices():
    """In a process of its own, since the number of devices is settled at the start."""
    tests = Path(__file__).parent
    code = (
        "import conftest, jax\n"
        "jax.config.update('jax_num_cpu_devices', 4)\n"
        "import test_interop_flax as flax_tests\n"
        "flax_tests.check_four_devices()\n"
        "print('done')"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tests,
        env=os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}"},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "done\n", result.stderr[-2000:]


def check_four_devices():
    for name in BOTH:
        model = check_nnx(name, auto_mesh(4))
        kernel = model.up.kernel[...]
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(8, 6)}


def test_a_state_is_not_restored_into_one_of_another_codec():
    nj.register_for_flax()
    make = lambda codec: nj.quantize_state(
        nj.momentum(), {"momentum": codec}, min_size=1
    )
    params = {"w": jnp.ones((8, 32))}
    saved = serialization.to_bytes(make(nj.Int8(16)).init(params))
    for codec in (nj.Int4(16), nj.Int8(32), nj.Int8(16, stochastic_rounding=True)):
        with pytest.raises(ValueError, match=r"saved by Int8\(block_size=16"):
            serialization.from_bytes(make(codec).init(params), saved)


@every
def test_a_state_round_trips_through_flax_serialization(name):
    nj.register_for_flax()
    tx, update = network.compiled(name)
    params = network.init()
    empty = tx.init(params)
    _, state = update(jax.grad(network.loss)(params), empty, params)
    restored = serialization.from_bytes(empty, serialization.to_bytes(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert helpers.types(restored) == helpers.types(state)
    chex.assert_trees_all_equal(restored, state)
    after = [update(params, s, params)[0] for s in (state, restored)]
    chex.assert_trees_all_equal(*after)
