"""Plain Muon against Optax's and against ten lines of NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
import nanochat_jax as nj
from nanochat_jax.optimizer.memory import compiled_bytes

PARAMS = {"wide": jnp.ones((8, 24)), "tall": jnp.ones((24, 8))}


def grads(step):
    return jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(step), x.shape), PARAMS
    )


def muon(lr, weight_decay=0.0, **kwargs):
    return optax.chain(
        nj.momentum(**kwargs),
        nj.orthogonalize(dtype="float32"),
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
    tx = optax.chain(nj.orthogonalize(dtype="float32"), nj.scale_by_shape("rms"))
    updates, _ = tx.update(grads(0), tx.init(PARAMS))
    for u in updates.values():
        assert 0.15 < jnp.sqrt(jnp.mean(u**2)) < 0.25


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("count", [4, 7, 12])  # two parts; two and a rest; four
def test_a_few_matrices_at_a_time_give_what_all_give(count, dtype, atol):
    params = {"stack": jax.random.normal(jax.random.key(0), (count, 16, 40), dtype)}
    tx = nj.orthogonalize(dtype="float32", max_bytes=3 * 4 * 16 * 40)
    updates, _ = jax.jit(tx.update)(params, tx.init(params))
    whole, _ = nj.orthogonalize(dtype="float32").update(params, tx.init(params))
    helpers.assert_close(updates, whole, atol=atol)


@helpers.on_processors
def test_temporaries_are_those_of_the_matrices_worked_on_at_a_time():
    params = {"stack": jax.ShapeDtypeStruct((16, 256, 256), jnp.float32)}
    matrix = 4 * 256 * 256
    temporaries = lambda max_bytes: compiled_bytes(
        nj.orthogonalize(dtype="float32", max_bytes=max_bytes), params
    )["temp_bytes"]
    assert temporaries(matrix) < 5 * matrix
    assert temporaries(16 * matrix) > 16 * 2 * matrix


def test_a_function_in_place_of_newton_schulz_is_given_whole_matrices():
    given = []

    def double(x):
        given.append(x.shape)
        return 2 * x

    tx = nj.orthogonalize(double)
    updates, _ = tx.update(grads(0), tx.init(PARAMS))
    helpers.assert_close(updates, jax.tree.map(lambda g: 2 * g, grads(0)))
    assert given == [(1, 24, 8), (1, 8, 24)]


def test_a_function_that_changes_shape_or_type_is_refused():
    tx = nj.orthogonalize(lambda x: x[..., :1])
    with pytest.raises(ValueError, match=r"must return float32 of shape \(1, 24, 8\)"):
        tx.update(grads(0), tx.init(PARAMS))
    with pytest.raises(ValueError, match="`dtype` and `form`"):
        nj.orthogonalize(lambda x: x, dtype="float32")


@pytest.mark.parametrize("make", [nj.orthogonalize, nj.scale_by_shape])
def test_vectors_are_refused_all_at_once(make):
    tx = make()
    bad = {"w": jnp.ones((2, 2)), "bias": jnp.ones(3), "scale": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"\['bias'\] (.|\n)*\['scale'\] "):
        tx.update(bad, tx.init(bad))


def test_an_unknown_shape_rule_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"'width', 'rms', 'none'.*'spectral'"):
        nj.scale_by_shape("spectral")


def optax_labels(params):
    """Optax's rule: what has two axes is a matrix."""
    return jax.tree.map(lambda x: "matrix" if x.ndim == 2 else "vector", params)


TREE = PARAMS | {"bias": jnp.ones(24), "embed": jnp.ones((16, 8))}


def train(tx, steps):
    """Twenty steps on gradients that depend on the parameters."""
    params, state, update = TREE, tx.init(TREE), jax.jit(tx.update)
    for step in range(steps):
        keys = jax.random.split(jax.random.key(step), len(params))
        noise = {
            name: jax.random.normal(key, params[name].shape)
            for name, key in zip(params, keys, strict=True)
        }
        grads = jax.tree.map(lambda p, n: p + n, params, noise)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


RATES = [
    pytest.param(0.02, marks=pytest.mark.slow),
    optax.linear_schedule(0.05, 0.01, 20),
]


@pytest.mark.parametrize("rate", RATES)
def test_muon_is_that_of_optax_for_twenty_steps(rate):
    ours = nj.muon(
        rate,
        bias_correction=True,
        ns_dtype="float32",
        weight_decay=0.1,
        adam_learning_rate=rate,
        adam_b2=0.999,
        adam_weight_decay=0.0,
        adam_nesterov=True,
        labels=optax_labels,
    )
    theirs = optax.contrib.muon(rate, weight_decay=0.1)
    helpers.assert_close(train(ours, 20), train(theirs, 20), atol=1e-5, rtol=0)


def test_muon_is_what_build_optimizer_makes_of_the_same_settings():
    config = nj.OptimizerConfig(
        lr=0.02, fallback_lr=0.003, weight_decay=0.1, use_8bit_optim=True,
        use_galore=True, galore_rank=5, galore_update_freq=2, quant_min_size=1,
        total_steps=10**9, grad_clip=1.0, seed=3,
    )  # fmt: skip
    built = nj.build_optimizer(config, TREE)
    muon = nj.muon(
        0.02, bits=8, rank=5, refresh_every=2, weight_decay=0.1, min_size=1,
        grad_clip=1.0, seed=3,
    )  # fmt: skip
    helpers.assert_close(train(muon, 3), train(built, 3), atol=1e-6)


@pytest.mark.parametrize("bits", [32, 8])
def test_rates_decays_and_betas_of_muon_can_be_injected(bits):
    tx = optax.inject_hyperparams(nj.muon, static_args=nj.MUON_STATIC)(
        learning_rate=0.02, bits=bits, weight_decay=0.1, beta=0.9, min_size=1
    )
    state = tx.init(TREE)
    assert {"learning_rate", "weight_decay", "beta", "adam_b1", "adam_b2"} <= set(
        state.hyperparams
    )
    update = jax.jit(tx.update)
    grads = jax.tree.map(jnp.ones_like, TREE)
    for rate, decay in [(0.02, 0.1), (0.05, 0.0)]:
        state.hyperparams["learning_rate"] = jnp.asarray(rate)
        state.hyperparams["weight_decay"] = jnp.asarray(decay)
        updates, _ = update(grads, state, TREE)
        plain = nj.muon(rate, bits=bits, weight_decay=decay, beta=0.9, min_size=1)
        wanted, _ = plain.update(grads, plain.init(TREE), TREE)
        helpers.assert_close(updates, wanted, atol=1e-6)
    assert update._cache_size() == 1


def test_what_must_not_be_traced_is_said_in_one_message():
    tx = optax.inject_hyperparams(nj.muon)(learning_rate=0.02, bits=8, rank=4)
    with pytest.raises(TypeError, match=r"'bits', 'rank'.*'min_size'.*MUON_STATIC"):
        tx.init(TREE)
    for wrong in ({"bits": 16}, {"bits": 2}, {"rank": 0}, {"ns_method": "none"}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
            nj.muon(0.02, **wrong)


def test_the_rate_of_adam_follows_that_of_muon():
    grads = jax.tree.map(jnp.ones_like, TREE)
    update = lambda rate, **kwargs: nj.muon(rate, **kwargs).update(
        grads, nj.muon(rate, **kwargs).init(TREE), TREE
    )[0]["bias"]
    helpers.assert_close(update(0.02), jnp.full(24, -0.003))
    helpers.assert_close(update(lambda _: 0.02), jnp.full(24, -0.003))
    helpers.assert_close(update(0.02, adam_learning_rate=0.5), jnp.full(24, -0.5))


def test_vectors_are_not_decayed_and_tables_are_as_told():
    zeros = optax.tree.zeros_like(TREE)
    for given, of_tables in ({}, 0.1), ({"adam_weight_decay": 0.5}, 0.5):
        tx = nj.muon(1.0, weight_decay=0.1, adam_learning_rate=1.0, **given)
        updates, _ = tx.update(zeros, tx.init(TREE), TREE)
        helpers.assert_close(updates["bias"], jnp.zeros(24))
        helpers.assert_close(updates["embed"], jnp.full((16, 8), -of_tables))
        helpers.assert_close(updates["wide"], jnp.full((8, 24), -0.1))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"complement_bits": 2, "refresh_every": 9}, "`rank` is required by"),
        (
            {"precondition_every": 2, "average_start": 3},
            "`precondition` is required by `precondition_every`, got none.\n"
            "`average_horizon` is required by `average_start`, got none.",
        ),
        ({"groups": [{"match": "a", "rate": 1.0, "lrr": 1.0}]}, "you mean `lr`?"),
        ({"groups": [{"match": "a", "optimizer": "lion"}]}, "`lr` is required in the"),
        ({"rank": 4, "complement": -1.0}, "`complement` must be at least 0"),
        ({"rank": 4, "refresh_every": 0}, "`refresh_every` must be at least 1"),
        ({"beta": 2.0, "min_size": -1}, "`min_size` must be at least 0"),
        ({"beta": 1.0}, "`beta` must lie in"),
        ({"adam_b2": 1.0}, "`adam_b1` and `adam_b2` must lie in"),
        ({"weight_decay": -1.0}, "`weight_decay` must be at least 0"),
        ({"learning_rate": -0.1}, "`learning_rate` must be at least 0"),
        ({"average_horizon": -1}, "`average_start` and `average_horizon` must be at"),
    ],
)
def test_arguments_are_refused_by_their_own_names(arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        nj.muon(**{"learning_rate": 0.02} | arguments)


@pytest.mark.parametrize("method", ["aol", "quintic", "polar_express_8"])
def test_a_method_takes_its_own_number_of_steps(method):
    params = {"up": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
    grads = {"up": {"kernel": jnp.eye(4, 8) + 0.1, "bias": jnp.ones(8)}}
    steps = len(nj.POLYNOMIALS[method].coefficients)
    by_itself, said = (
        nj.muon(0.02, ns_method=method, ns_dtype="float32", **given)
        for given in ({}, {"ns_steps": steps})
    )
    updates = [tx.update(grads, tx.init(params), params)[0] for tx in (by_itself, said)]
    jax.tree.map(np.testing.assert_array_equal, *updates)
