"""The learning rate is what was asked for, and a state tells which is in force."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nanochat_jax as nj

PARAMS = {"up": {"kernel": jnp.ones((16, 32)), "bias": jnp.ones(32)}}
# Of full rank: beside directions without a gradient, rounding is raised to one.
KERNEL = jax.random.normal(jax.random.key(0), (16, 32))
GRADS = {"up": {"kernel": KERNEL, "bias": jnp.arange(1.0, 33.0)}}
FALLS = optax.linear_schedule(0.02, 0.0, 10)


def after(tx, steps):
    state = tx.init(PARAMS)
    for _ in range(steps):
        state = tx.update(GRADS, state, PARAMS)[1]
    return state


def configured(**settings):
    return nj.build_optimizer(nj.OptimizerConfig(**settings), PARAMS)


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(tx)])
@pytest.mark.parametrize(
    ("tx", "matrix", "vector"),
    [
        (nj.muon(FALLS), 0.014, 0.0021),
        (nj.muon(0.02, grad_clip=1.0), 0.02, 0.003),
        (configured(lr=FALLS), 0.014, 0.003),
        (configured(total_steps=5, schedule="linear"), 0.008, 0.0012),
        (configured(warmup_steps=6, fallback_lr=FALLS), 0.02 * 4 / 6, 0.014),
    ],
    ids=["schedule", "number", "schedule in settings", "decay", "warm-up"],
)
def test_the_rate_in_force_is_read_from_the_state(tx, matrix, vector, wrap):
    tx = wrap(tx)
    rates = nj.learning_rates(tx, after(tx, 3), PARAMS)
    assert rates.keys() == {"matrix", "vector"}
    np.testing.assert_allclose([rates["matrix"], rates["vector"]], [matrix, vector])


def test_it_is_the_rate_of_the_next_update():
    tx = nj.muon(FALLS)
    state = after(tx, 3)
    rate = nj.learning_rates(tx, state, PARAMS)["matrix"]
    norm = lambda tx: optax.tree.norm(tx.update(GRADS, state, PARAMS)[0]["up"])
    other = nj.muon(lambda count: 0 * FALLS(count) + 1)
    # Both rates are of the vector too, 0.15 times that of the matrix.
    np.testing.assert_allclose(norm(tx), rate * norm(other), rtol=1e-5)


def test_other_transformations_and_injected_rates_are_refused():
    with pytest.raises(ValueError, match="another transformation"):
        nj.learning_rates(optax.adam(0.1), optax.adam(0.1).init(PARAMS), PARAMS)
    tx = optax.inject_hyperparams(nj.muon, static_args=nj.MUON_STATIC)(
        learning_rate=0.02
    )
    with pytest.raises(ValueError, match="hyperparams"):
        nj.learning_rates(tx, tx.init(PARAMS), PARAMS)


def test_of_two_optimizers_each_tells_its_own():
    two = optax.partition(
        {"a": nj.muon(0.3), "b": nj.muon(0.1)}, {"up": {"kernel": "a", "bias": "b"}}
    )
    rates = {leaf.path: leaf.rate for leaf in nj.describe(two, PARAMS).leaves}
    assert rates == {"up/kernel": "0.3", "up/bias": "0.015"}
    for tx in (two, optax.chain(nj.muon(0.3), nj.muon(FALLS))):
        with pytest.raises(ValueError, match="of 2 optimizers"):
            nj.learning_rates(tx, tx.init(PARAMS), PARAMS)


def test_a_state_of_another_optimizer_is_refused():
    for other in (optax.adam(0.1), nj.muon(0.02)):
        with pytest.raises(ValueError, match=r"not of one|another optimizer"):
            nj.learning_rates(nj.muon(FALLS), other.init(PARAMS), PARAMS)


def test_a_rate_in_settings_has_a_gradient():
    def total(rate):
        tx = configured(lr=rate, fallback_lr=rate)
        return jnp.sum(tx.update(GRADS, tx.init(PARAMS), PARAMS)[0]["up"]["bias"])

    wanted = jax.jit(jax.grad(total))(0.1)
    assert wanted < 0
    np.testing.assert_allclose(jax.grad(total)(0.1), wanted, rtol=1e-6)
    with pytest.raises(ValueError, match="`weight_decay` must be known"):
        jax.grad(lambda x: configured(weight_decay=x) and x)(0.1)


def test_without_total_steps_the_rate_stays_and_a_decay_asks_for_them():
    steady = nj.learning_rates(tx := configured(), after(tx, 3), PARAMS)
    assert float(steady["matrix"]) == np.float32(0.02)
    counts = jnp.asarray(10**6)
    rate = nj.optimizer.schedule(nj.OptimizerConfig(warmup_steps=10), 0.02)
    assert float(rate(counts)) == np.float32(0.02)
    for name in ("cosine", "linear"):
        with pytest.raises(ValueError, match="`total_steps` is required"):
            nj.OptimizerConfig(schedule=name)


def test_a_traced_rate_in_settings_updates_as_the_number_does():
    @jax.jit
    def step(rate):
        tx = configured(lr=rate, fallback_lr=rate, ns_steps=1)
        return tx.update(GRADS, tx.init(PARAMS), PARAMS)[0]

    tx = configured(lr=0.5, fallback_lr=0.5, ns_steps=1)
    wanted = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)[0]
    # Two programs, whose rounding one step of Newton-Schulz raises 3 times, not 485.
    close = lambda a, b: np.testing.assert_allclose(a, b, 1e-6, 1e-6 * abs(b).max())
    jax.tree.map(close, step(0.5), wanted)
