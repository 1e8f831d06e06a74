"""The laws of `quantize_state`, for any transform inside."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
import nanochat_jax as nj
from nanochat_jax.transforms import MomentumState

PARAMS = {"w": jnp.zeros((8, 32)), "b": jnp.zeros(5)}


def grads(step):
    keys = jax.random.split(jax.random.key(step))
    return {k: jax.random.normal(key, PARAMS[k].shape) for k, key in zip("wb", keys)}  # noqa: B905


def run(tx, steps=3):
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(grads(step), state, PARAMS)
    return updates, state


@pytest.mark.parametrize("codec", [nj.Int8(16), nj.Int4(16)], ids=lambda c: c.name)
def test_after_one_step_state_is_within_half_a_step_and_updates_are_exact(codec):
    inner = nj.momentum(0.9)
    tx = helpers.quantized(inner, {"momentum": codec})
    updates, state = run(tx, 1)
    expected, exact = run(inner, 1)
    helpers.assert_close(updates, expected)  # only the stored copy is rounded
    stored = nj.dequantize(state).momentum
    largest = jax.tree.map(lambda m: jnp.abs(m).max(), exact.momentum)
    for name in PARAMS:
        error = jnp.abs(stored[name] - exact.momentum[name]).max()
        assert 0 < error <= 0.5 * largest[name] / codec.levels * 1.001


def test_int8_follows_the_exact_momentum_over_many_steps():
    inner = nj.momentum(0.95)
    updates, _ = run(helpers.quantized(inner, helpers.INT8), 50)
    expected, _ = run(inner, 50)
    error = jnp.linalg.norm(updates["w"] - expected["w"])
    # 0.5 % of one rounding in blocks of 16, over √(1 - β²).
    assert error / jnp.linalg.norm(expected["w"]) < 0.02


def test_it_serves_transforms_of_optax_and_leaves_other_fields_alone():
    inner = optax.scale_by_adam()
    tx = nj.quantize_state(inner, {"mu": nj.Int8(16)}, min_size=6)
    state = tx.init(PARAMS)
    assert state.inner.mu["w"].codes.dtype == jnp.int8
    assert state.inner.mu["b"].dtype == jnp.float32  # below `min_size`
    assert state.inner.nu["w"].dtype == jnp.float32
    assert state.inner.count.dtype == jnp.int32
    updates, _ = run(tx, 1)
    helpers.assert_close(updates, run(inner, 1)[0])


def test_leaves_that_are_not_floating_point_are_kept():
    inner = optax.GradientTransformation(
        lambda p: MomentumState(jax.tree.map(lambda x: x.astype(jnp.int32), p)),
        lambda u, s, p=None: (u, s),
    )
    state = helpers.quantized(inner, helpers.INT8).init(PARAMS)
    assert state.inner.momentum["w"].dtype == jnp.int32


def test_stochastic_rounding_depends_on_seed_and_step_and_leaf():
    codec = nj.Int8(16, stochastic_rounding=True)
    make = lambda seed: nj.quantize_state(
        nj.momentum(0.0, nesterov=False), {"momentum": codec}, min_size=1, seed=seed
    )
    same = jax.tree.map(lambda x: jnp.ones_like(x).at[0].set(0.3), PARAMS)

    def codes(seed, steps):
        tx = make(seed)
        state = tx.init(PARAMS)
        for _ in range(steps):
            _, state = tx.update(same, state)
        return np.asarray(state.inner.momentum["w"].codes)[0]

    first = codes(0, 1)
    assert set(first) == {127}  # 0.3 is the largest of its row
    uneven = {"w": PARAMS["w"].at[:, 0].set(1.0).at[:, 1:].set(0.3), "b": PARAMS["b"]}

    def rows(seed, steps):
        tx = make(seed)
        state = tx.init(PARAMS)
        for _ in range(steps):
            _, state = tx.update(uneven, state)
        return np.asarray(state.inner.momentum["w"].codes)

    assert np.array_equal(rows(0, 1), rows(0, 1))
    assert not np.array_equal(rows(0, 1), rows(0, 2))
    assert not np.array_equal(rows(0, 1), rows(1, 1))
    assert {38, 39} <= set(rows(0, 1)[:, 2:].ravel())  # 0.3 x 127 = 38.1


def test_stochastic_rounding_is_unbiased_in_the_state():
    codec = nj.Int4(32, stochastic_rounding=True)
    inner = nj.momentum(0.0, nesterov=False)
    tx = nj.quantize_state(inner, {"momentum": codec}, min_size=1)
    update = jax.jit(lambda s: tx.update(grads(0), s)[1])
    state, total, count = tx.init(PARAMS), 0.0, 400
    for _ in range(count):
        state = update(state)
        total += nj.dequantize(state).momentum["w"]
    error = np.abs(total / count - grads(0)["w"])
    step = np.abs(grads(0)["w"]).max() / 7
    assert error.max() < 5 * 0.5 * step / count**0.5


def test_a_field_that_is_not_there_is_refused_with_those_that_are():
    tx = nj.quantize_state(optax.scale_by_rms(), {"mu": nj.Int8(), "m": nj.Int8()})
    with pytest.raises(ValueError, match=r"\['m', 'mu'\](.|\n)*\['nu'\]"):
        tx.init(PARAMS)


def test_both_flags_nest_truly():
    """Momentum is low-rank and int8, the basis int4; nothing is full-size."""
    tx = helpers.quantized(nj.galore(helpers.muon(), 2), helpers.BOTH)
    state = tx.init({"w": jnp.zeros((16, 64))})
    galore_state = state.inner
    assert galore_state.basis["w"].codes.shape == (16, 1)  # two codes a byte
    momentum = galore_state.inner[0].momentum["w"]
    assert momentum.codes.shape == (2, 64)
    assert momentum.codes.dtype == jnp.int8
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    assert held < 16 * 64


def test_a_decoded_int4_basis_stays_nearly_orthonormal():
    tx = helpers.quantized(nj.galore(nj.momentum(), 16), {"basis": nj.Int4(16)})
    g = {"w": jax.random.normal(jax.random.key(0), (64, 128))}
    _, state = tx.update(g, tx.init(g))
    p = state.inner.basis["w"].decode()
    assert jnp.abs(p.mT @ p - jnp.eye(16)).max() < 0.1


CODECS = [
    nj.Int8(16),
    nj.Int8(32),
    nj.Int8(64),  # one block a row, as with 32
    nj.Int8(16, scale_dtype="bfloat16"),
    nj.Int8(16, stochastic_rounding=True),
    nj.Int4(8, scale_dtype="bfloat16"),
    nj.Normal4(8),  # codes and scales as above
    nj.Dynamic8(16),
    nj.Dynamic8(16, signed=False, zero=False),
    nj.Normal2(16),
]


def test_a_state_of_another_codec_is_refused_and_both_are_named():
    make = lambda codec: helpers.quantized(nj.momentum(), {"momentum": codec})
    for codec, given in itertools.product(CODECS, CODECS):
        state, tx = jax.eval_shape(make(codec).init, PARAMS), make(given)
        if codec == given:
            jax.eval_shape(tx.update, PARAMS, state, PARAMS)
            continue
        both = f"{re.escape(str(codec))}.*{re.escape(str(given))}"
        with pytest.raises(ValueError, match=rf"momentum\['w'\] is stored by {both}"):
            jax.eval_shape(tx.update, PARAMS, state, PARAMS)


def test_a_stored_leaf_says_its_shape_and_type_also_in_part():
    stored = nj.Int4(4).encode(jnp.ones((3, 5, 7), jnp.bfloat16))
    assert (stored.shape, stored.ndim, stored.size) == ((3, 5, 7), 3, 105)
    assert stored.dtype == jnp.bfloat16
    assert stored.nbytes == stored.codes.nbytes + stored.scales.nbytes
    row = jax.tree.map(lambda x: x[1], stored)
    assert row.shape == (5, 7)
    np.testing.assert_array_equal(row.decode(), stored.decode()[1])


@pytest.mark.parametrize(
    ("codecs", "message"),
    [
        ({"momentum": nj.Int8, "nu": "int8"}, r"momentum: <class(.|\n)*nu: 'int8'"),
        (nj.Int8(), r"must be a mapping.*got Int8\("),
    ],
)
def test_what_is_no_codec_is_refused_at_once(codecs, message):
    with pytest.raises(TypeError, match=message):
        nj.quantize_state(nj.momentum(), codecs)


def test_a_leaf_that_is_stored_without_a_codec_is_refused():
    state = helpers.quantized(optax.scale_by_adam(), {"mu": nj.Int8(16)}).init(PARAMS)
    tx = helpers.quantized(optax.scale_by_adam(), {"nu": nj.Int8(16)})
    with pytest.raises(ValueError, match=r"mu\['b'\](.|\n)*mu\['w'\](.|\n)*no codec"):
        tx.update(PARAMS, state, PARAMS)
