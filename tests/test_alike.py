"""Leaves that share a program have the updates that they would have apart."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
import nanochat_jax as nj
from nanochat_jax.config import Group
from nanochat_jax.optimizer import matrix_optimizer
from nanochat_jax.optimizer.memory import planned_bytes
from nanochat_jax.transforms.scheduling import Parts, alike, groups

pytestmark = helpers.on_processors

SHAPES = {"plain": (16, 32), "heads": (16, 4, 8), "turned": (16, 32)}
AXES = {
    "plain": nj.MatrixAxes(0, 1),
    "heads": nj.MatrixAxes(0, (1, 2)),
    "turned": nj.MatrixAxes(1, 0),
}
FEW = {"use_8bit_optim": True, "quant_min_size": 1, "stochastic_rounding": True}
LOW = {"use_galore": True, "galore_rank": 5, "galore_update_freq": 2}
VARIANTS = {
    "few bits": FEW,
    "both": FEW | LOW,
    "links": {
        "normalize_rows": "normuon", "row_floor": 0.5, "cautious_decay": True,
        "weight_decay": 0.1, "average_horizon": 4, "total_steps": 9,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _six_leaves_to_a_group(monkeypatch):
    monkeypatch.setattr(groups, "CPU_GROUP_BYTES", 6 * 4 * math.prod(SHAPES["plain"]))


def tree(layers=7, dtype=jnp.float32, seed=0):
    draw = np.random.default_rng(seed)
    return {
        f"layer_{i}": {
            name: jnp.asarray(draw.normal(size=shape), dtype)
            for name, shape in SHAPES.items()
        }
        for i in range(layers)
    }


def built(params, **settings):
    config = nj.OptimizerConfig(**{"grad_clip": 0.0, "ns_steps": 2} | settings)
    axes = lambda path, shape: AXES[path.split("/")[-1]]
    return nj.build_optimizer(config, params, matrix_axes=axes)


def trained(tx, params, apply=False, steps=2):
    """Parameters and state after steps, jitted."""
    state, update = tx.init(params), jax.jit(tx.update, static_argnames="apply")
    for step in range(steps):
        grads = tree(len(params), params["layer_0"]["plain"].dtype, step + 1)
        new, state = update(grads, state, params, apply=apply)
        params = new if apply else optax.apply_updates(params, new)
    return params, state


def apart(monkeypatch):
    monkeypatch.setattr(alike, "_layout", lambda parts, i: i)


def products(tx, params):
    """Number of matrix products in the program of an update."""
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(tx.update).lower(params, state, params).compile()
    return len(re.findall(r" dot\(|matmul", compiled.as_text()))


@pytest.mark.parametrize(
    ("name", "dtype", "apply"),
    [
        ("few bits", "bfloat16", False),
        ("both", "float32", True),
        ("links", "bfloat16", True),
    ],
)
def test_updates_and_state_are_those_of_leaves_apart(name, dtype, apply, monkeypatch):
    params = tree(dtype=dtype)
    short = {"weight_rounding": "stochastic"} if dtype == "bfloat16" else {}
    found = trained(built(params, **VARIANTS[name], **short), params, apply)
    apart(monkeypatch)
    expected = trained(built(params, **VARIANTS[name], **short), params, apply)
    assert helpers.types(found) == helpers.types(expected)
    # A sum in another order may round a code, and that a weight, the other way.
    helpers.assert_close(found[0], expected[0], atol=1e-5 if dtype == "float32" else 0)
    helpers.assert_close(*map(nj.dequantize, (found[1], expected[1])), atol=0.05)


@pytest.mark.parametrize("name", ["both", "links"])
def test_a_program_does_not_grow_with_the_number_of_leaves(name):
    few, many = (products(built(tree(n), **VARIANTS[name]), tree(n)) for n in (9, 15))
    assert 0 < few == many


def test_groups_of_the_configuration_keep_their_numbers():
    """Leaves of one shape whose rates differ do not share a program."""
    params, grads = tree(14), tree(14, seed=1)
    slow = Group("layer_[0-6]/.*", lr=0.01)
    tx = built(params, lr=0.02, weight_decay=0.0, groups=(slow,), total_steps=1)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    norm = lambda i: float(jnp.linalg.norm(updates[f"layer_{i}"]["plain"]))
    assert norm(0) * 2 == pytest.approx(norm(13), rel=0.1)


@pytest.mark.parametrize("count", [2, 3, 5, 7, 11, 12])
def test_a_stack_fits_half_a_group_and_divides_the_leaves(count):
    zeros = {f"w{i}": jnp.zeros((4, 8)) for i in range(count)}
    parts = Parts.of(zeros, (), None)
    for fitting in range(1, 14):
        found = alike.find_alike(parts, lambda path, shape: True, 128 * fitting)
        assert bool(found) == (1 < fitting < count)
        for each in found:
            assert len(each.names) % each.together == 0
            assert fitting // 4 <= each.together <= fitting // 2
            assert len(each.names) > count - each.together
            assert len(each.names) > each.together


def test_leaves_share_a_program_if_all_of_them_agree_in_all():
    zeros = {f"w{i}": jnp.zeros((4, 8)) for i in range(6)}
    kinds = {"['w0']": None, "['w1']": "other"}
    kind = lambda path, shape: kinds.get(jax.tree_util.keystr(path), "one")
    names = lambda state: [
        x.names for x in alike.find_alike(Parts.of(zeros, state, None), kind, 256)
    ]
    rest = tuple(f"['w{i}']" for i in range(2, 6))
    assert names(()) == [rest]
    # One is stored otherwise.
    state = {"m": zeros | {"w5": jnp.zeros((4, 8), jnp.bfloat16)}}
    assert names(state) == [rest[:-1]]
    assert names({"m": zeros | {"w5": None}}) == [rest[:-1]]


@pytest.mark.parametrize("donated", [(), (1,), (0, 1)])
@pytest.mark.parametrize("name", ["muon", "few bits", "both"])
def test_temporaries_are_those_of_one_group(name, donated, monkeypatch):
    shape = (128, 260)
    monkeypatch.setattr(groups, "CPU_GROUP_BYTES", 2 * 4 * math.prod(shape))
    params = {f"w{i}": jax.ShapeDtypeStruct(shape, "float32") for i in range(16)}
    settings = VARIANTS.get(name, {}) | {"stochastic_rounding": False}
    config = nj.OptimizerConfig(**settings, grad_clip=0.0, weight_decay=0.1)
    tx = nj.build_optimizer(config, params)
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(tx.update, donate_argnums=donated).lower(params, state, params)
    temp = planned_bytes(step.compile())["temp_bytes"]
    assert temp <= 1.01 * 3 * 2 * 4 * math.prod(shape)


def few_bits_of_one_shape():
    tx = matrix_optimizer(nj.OptimizerConfig(**FEW | LOW, ns_steps=2))
    return tx, {f"w{i}": tree()[f"layer_{i}"]["plain"] for i in range(7)}


def test_updates_are_differentiated_in_both_directions():
    tx, params = few_bits_of_one_shape()

    def product(share):
        grads = jax.tree.map(lambda x: x + share * jnp.cos(x), params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.tree.vdot(updates, params)

    forwards = jax.jit(lambda share: jax.jvp(product, (share,), (1.0,))[1])(0.1)
    assert abs(forwards) > 1e-3
    np.testing.assert_allclose(jax.jit(jax.grad(product))(0.1), forwards, rtol=1e-3)


def test_it_runs_in_scan_with_64_bits_and_strict_promotion():
    tx, params = few_bits_of_one_shape()

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        start = params, tx.init(params)
        done, _ = jax.lax.scan(step, start, length=2)
        assert helpers.types(done) == helpers.types(start)


def test_it_runs_without_jit():
    tx = nj.sequence(nj.momentum(), max_bytes=512, alike=lambda path, shape: True)
    params = {f"w{i}": jnp.full((4, 8), float(i)) for i in range(7)}
    state = tx.init(params)
    with jax.disable_jit():
        found = tx.update(params, state)
    helpers.assert_close(found, nj.momentum().update(params, state))
