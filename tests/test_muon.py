"""Plain Muon against Optax's and against ten lines of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
import nanochat_jax as nj
from nanochat_jax.memory import compiled_bytes

PARAMS = {"wide": jnp.ones((8, 24)), "tall": jnp.ones((24, 8))}


def grads(step):
    return jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(step), x.shape), PARAMS
    )


def muon(lr, weight_decay=0.0, **kwargs):
    return optax.chain(
        nj.momentum(**kwargs),
        nj.orthogonalize(),
        nj.scale_by_shape("width"),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(lr),
    )


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_first_update_is_that_of_optax(nesterov):
    """Later ones differ: Optax corrects the bias of Nesterov's two terms apart."""
    ours = muon(0.1, 0.01, nesterov=nesterov)
    theirs = optax.contrib.muon(0.1, nesterov=nesterov, weight_decay=0.01)
    a, _ = ours.update(grads(0), ours.init(PARAMS), PARAMS)
    b, _ = theirs.update(grads(0), theirs.init(PARAMS), PARAMS)
    helpers.assert_close(a, b)


def numpy_muon(w, gradients, lr, beta, weight_decay):
    m = np.zeros_like(w)
    for g in gradients:
        m = beta * m + (1 - beta) * g
        x = beta * m + (1 - beta) * g
        x = x / np.linalg.norm(x)
        for a, b, c in nj.QUINTIC.coefficients:
            s = x @ x.T
            x = a * x + (b * s + c * s @ s) @ x
        scale = max(1, w.shape[1] / w.shape[0]) ** 0.5
        w = w - lr * (scale * x + weight_decay * w)
    return w


def test_a_trajectory_is_that_of_ten_lines_of_numpy():
    tx, params = muon(0.1, 0.01, beta=0.9), PARAMS
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(6):
        updates, state = update(grads(step), state, params)
        params = optax.apply_updates(params, updates)
    for name, start in PARAMS.items():
        gs = [np.asarray(grads(step)[name], np.float64) for step in range(6)]
        expected = numpy_muon(np.asarray(start, np.float64), gs, 0.1, 0.9, 0.01)
        np.testing.assert_allclose(params[name], expected, atol=2e-5)


def test_momentum_of_a_constant_gradient():
    tx = nj.momentum(0.5, nesterov=False)
    g = {"w": jnp.ones((2, 2))}
    state = tx.init(g)
    for expected in (0.5, 0.75, 0.875):
        u, state = tx.update(g, state)
        helpers.assert_close(u["w"], jnp.full((2, 2), expected))
    u, _ = nj.momentum(0.5).update(g, tx.init(g))
    helpers.assert_close(u["w"], jnp.full((2, 2), 0.75))  # one step ahead


@pytest.mark.parametrize(
    ("mode", "wide", "tall"),
    [("width", 3**0.5, 1.0), ("rms", 0.2 * 24**0.5, 0.2 * 24**0.5), ("none", 1, 1)],
)
def test_scale_by_shape(mode, wide, tall):
    tx = nj.scale_by_shape(mode)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    assert updates["wide"][0, 0] == pytest.approx(wide)
    assert updates["tall"][0, 0] == pytest.approx(tall)


def test_rms_scaling_gives_an_update_of_adam_size():
    tx = optax.chain(nj.orthogonalize(), nj.scale_by_shape("rms"))
    updates, _ = tx.update(grads(0), tx.init(PARAMS))
    for u in updates.values():
        assert 0.15 < jnp.sqrt(jnp.mean(u**2)) < 0.25


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("count", [4, 7, 12])  # two parts; two and a rest; four
def test_a_few_matrices_at_a_time_give_what_all_give(count, dtype, atol):
    params = {"stack": jax.random.normal(jax.random.key(0), (count, 16, 40), dtype)}
    tx = nj.orthogonalize(max_bytes=3 * 4 * 16 * 40)
    updates, _ = jax.jit(tx.update)(params, tx.init(params))
    whole, _ = nj.orthogonalize().update(params, tx.init(params))
    helpers.assert_close(updates, whole, atol=atol)


@helpers.on_processors
def test_temporaries_are_those_of_the_matrices_worked_on_at_a_time():
    params = {"stack": jax.ShapeDtypeStruct((16, 256, 256), jnp.float32)}
    matrix = 4 * 256 * 256
    temporaries = lambda max_bytes: compiled_bytes(
        nj.orthogonalize(max_bytes=max_bytes), params
    )["temp_bytes"]
    assert temporaries(matrix) < 5 * matrix
    assert temporaries(16 * matrix) > 16 * 2 * matrix


@pytest.mark.parametrize("make", [nj.orthogonalize, nj.scale_by_shape])
def test_vectors_are_refused_all_at_once(make):
    tx = make()
    bad = {"w": jnp.ones((2, 2)), "bias": jnp.ones(3), "scale": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"\['bias'\] (.|\n)*\['scale'\] "):
        tx.update(bad, tx.init(bad))


def test_an_unknown_shape_rule_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"'width', 'rms', 'none'.*'spectral'"):
        nj.scale_by_shape("spectral")
