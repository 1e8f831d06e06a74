"""Laws of the links: decay, floors, fixed norms, averages, and momentum schedules."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nanochat_jax as nj
from nanochat_jax.config import Group
from nanochat_jax.transforms import (
    average_weights,
    averaged_weights,
    decay_weights,
    fix_norms,
    floor_updates,
    round_updates,
    split_master,
)


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


WEIGHTS = {"a": normal(0, 12, 20), "stack": normal(1, 3, 8, 6)}
GRADS = {"a": normal(2, 12, 20), "stack": normal(3, 3, 8, 6)}


def once(tx, grads=GRADS, params=WEIGHTS):
    return tx.update(grads, tx.init(params), params)[0]


def train(tx, steps, params=WEIGHTS, seed=10):
    """Returns parameters and state after some steps, and the parameters on the way."""
    state, step, seen = tx.init(params), jax.jit(tx.update), []
    for i in range(steps):
        grads = jax.tree.map(lambda p, i=i: normal(seed + i, *p.shape), params)
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return params, state, seen


@pytest.mark.parametrize("rate", [0.1, lambda count: 0.1 + 0 * count])
def test_decay_is_that_of_optax_and_cautious_decay_that_where_signs_agree(rate):
    plain = once(optax.add_decayed_weights(0.1))
    chex.assert_trees_all_close(once(decay_weights(rate)), plain, rtol=1e-6)
    cautious = once(decay_weights(rate, cautious=True))
    for name, u in GRADS.items():
        agree = jnp.sign(u) == jnp.sign(WEIGHTS[name])
        expected = jnp.where(agree, plain[name], u)
        np.testing.assert_allclose(cautious[name], expected, rtol=1e-6)
        # It never turns an update round, and never makes it smaller.
        assert bool(jnp.all(cautious[name] * u >= u * u))
    same = once(decay_weights(rate, cautious=True), WEIGHTS)
    chex.assert_trees_all_close(same, once(decay_weights(0.1), WEIGHTS), rtol=1e-6)


def test_cautious_decay_never_decays_a_weight_that_its_update_makes_larger():
    small = {"w": jnp.array([1e-30, -1e-30, 1e-30, 0.0])}
    grads = {"w": jnp.array([1e-30, 1e-30, -1e-30, 1.0])}  # products are zero
    updates = once(decay_weights(1.0, cautious=True), grads, small)["w"]
    np.testing.assert_allclose(updates, [2e-30, 1e-30, -1e-30, 1.0], rtol=1e-6)


def test_a_mask_leaves_leaves_out_of_decay():
    tx = decay_weights(0.5, mask={"a": True, "stack": False})
    updates = once(tx)
    np.testing.assert_array_equal(updates["stack"], GRADS["stack"])
    np.testing.assert_allclose(updates["a"], GRADS["a"] + 0.5 * WEIGHTS["a"], rtol=1e-6)


@pytest.mark.parametrize(("by", "axes"), [("matrix", (-2, -1)), ("neuron", (-2,))])
def test_a_floor_is_met_exactly_from_below_and_is_nothing_above(by, axes):
    norm = lambda x: np.linalg.norm(x, axis=axes, keepdims=True)
    ratio, sizes = 1.0, jnp.array([0.1, 1.0, 10.0])[:, None, None]
    grads = GRADS | {"stack": sizes * GRADS["stack"]}
    updates = once(floor_updates(ratio, by=by), grads)
    for name, u in grads.items():
        low = norm(u) < ratio * norm(WEIGHTS[name])
        assert name == "a" or {*low.ravel()} == {True, False}
        reached = np.maximum(norm(u), ratio * norm(WEIGHTS[name]))
        np.testing.assert_allclose(norm(updates[name]), reached, rtol=1e-5)
        cosine = np.sum(updates[name] * u, axes) / (norm(updates[name]) * norm(u)).sum(
            axes
        )
        np.testing.assert_allclose(cosine, 1, rtol=1e-5)
        kept = np.broadcast_to(~low, u.shape)
        np.testing.assert_array_equal(updates[name][kept], u[kept])
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    chex.assert_trees_all_equal(once(floor_updates(ratio, by=by), zeros), zeros)
    chex.assert_trees_all_equal(once(floor_updates(ratio, by=by), params=zeros), GRADS)


def test_fixed_norms_stay_while_directions_go_where_updates_lead():
    tx = optax.chain(optax.sgd(0.3), fix_norms())
    params, _, seen = train(tx, 20)
    norm = lambda x: np.linalg.norm(np.float64(x), axis=(-2, -1))
    for name, w in WEIGHTS.items():
        np.testing.assert_allclose(norm(params[name]), norm(w), rtol=2e-6)
    step = jax.tree.map(lambda w, g: w - 0.3 * g, WEIGHTS, {
        name: normal(10, *w.shape) for name, w in WEIGHTS.items()
    })  # fmt: skip
    for name, w in step.items():
        unit = w / norm(w)[..., None, None]
        got = seen[0][name] / norm(seen[0][name])[..., None, None]
        np.testing.assert_allclose(got, unit, atol=1e-6)
    zeros = jax.tree.map(jnp.zeros_like, WEIGHTS)
    started = once(tx, params=zeros)
    chex.assert_trees_all_close(started, jax.tree.map(lambda g: -0.3 * g, GRADS))


@pytest.mark.parametrize("start", [0, 3])
def test_an_average_is_the_mean_of_the_weights_since_its_start(start):
    tx = optax.chain(optax.sgd(0.1), average_weights(start))
    params, state, seen = train(tx, 8)
    counted = seen[start:]
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *counted)
    chex.assert_trees_all_close(averaged_weights(tx, state, params), mean, atol=1e-5)
    half = jax.tree.map(lambda w, m: (w + m) / 2, params, mean)
    chex.assert_trees_all_close(
        averaged_weights(tx, state, params, 0.5), half, atol=1e-5
    )


def test_an_average_with_a_horizon_is_exponential_after_it():
    tx = optax.chain(optax.sgd(0.1), average_weights(1, 3))
    params, state, seen = train(tx, 8)
    expected = seen[1]
    for i, w in enumerate(seen[2:], 2):
        share = 1 / min(i, 3)
        expected = jax.tree.map(lambda m, x, a=share: m + a * (x - m), expected, w)
    found = averaged_weights(tx, state, params)
    chex.assert_trees_all_close(found, expected, atol=1e-5)


@pytest.mark.parametrize("rounding", [round_updates, split_master])
def test_an_average_after_a_link_of_precision_is_of_the_weights_as_stored(rounding):
    tx = optax.chain(optax.sgd(0.1), rounding(), average_weights())
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), WEIGHTS)
    params, state, seen = train(tx, 6, params)
    mean = jax.tree.map(lambda *x: sum(y.astype(jnp.float32) for y in x) / 6, *seen)
    chex.assert_trees_all_close(averaged_weights(tx, state, params), mean, atol=1e-5)


def test_an_average_in_8_bits_is_near_the_mean():
    codec = nj.Int8(16, stochastic_rounding=True)
    kept = nj.quantize_state(average_weights(), {"average": codec}, min_size=1)
    tx = optax.chain(optax.sgd(0.1), kept)
    params, state, seen = train(tx, 30)
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *seen)
    found = averaged_weights(tx, state, params)
    off = optax.tree.norm(optax.tree.sub(found, mean))
    assert off < 0.05 * optax.tree.norm(optax.tree.sub(params, mean))


def test_an_average_is_read_through_views_and_beside_them():
    """A square matrix of `(out, in)` has a view of its own shape, turned round."""
    axes = lambda path, shape: nj.MatrixAxes(1, 0) if len(shape) == 2 else None
    params = {"square": normal(0, 6, 6), "heads": normal(1, 4, 2, 3)}
    inside = optax.chain(
        nj.as_matrices(optax.chain(optax.sgd(0.1), average_weights()), axes)
    )
    outside = optax.chain(nj.as_matrices(optax.sgd(0.1), axes), average_weights())
    for tx in (inside, outside):
        after, state, seen = train(tx, 4, params)
        mean = jax.tree.map(lambda *x: sum(x) / 4, *seen)
        chex.assert_trees_all_close(averaged_weights(tx, state, after), mean, atol=1e-5)
    with pytest.raises(ValueError, match="this one has none"):
        averaged_weights(optax.sgd(0.1), optax.sgd(0.1).init(params), params)


def test_links_that_need_parameters_say_so():
    for link in (decay_weights(0.1), floor_updates(0.1), fix_norms()):
        with pytest.raises(ValueError, match="`params` was not given"):
            link.update(GRADS, link.init(WEIGHTS))
    for link in (floor_updates(0.1), fix_norms()):
        with pytest.raises(ValueError, match="two or more axes"):
            link.init({"bias": jnp.ones(3)})


def test_momentum_may_warm_up():
    rises = optax.linear_schedule(0.5, 0.9, 4)
    tx = nj.momentum(rises, nesterov=False)
    state, expected = tx.init(WEIGHTS), jnp.zeros((12, 20))
    for step in range(6):
        updates, state = tx.update(GRADS, state)
        beta = min(0.5 + 0.1 * step, 0.9)
        expected = beta * expected + (1 - beta) * GRADS["a"]
        np.testing.assert_allclose(updates["a"], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="needs one number"):
        nj.momentum(rises, bias_correction=True)


PARAMS = {
    "embed": {"embedding": normal(4, 16, 8)},
    "up": {"kernel": normal(5, 8, 24), "bias": normal(6, 24)},
}
ALL = {
    "cautious_decay": True, "update_floor": 0.1, "row_floor": 0.2, "fixed_norm": True,
    "normalize_rows": "normuon", "precondition": "short", "precondition_every": 2,
    "precondition_bits": 16,
}  # fmt: skip


def test_muon_has_the_links_of_a_configuration():
    settings = ALL | {"weight_decay": 0.1, "ns_dtype": "float32"}
    config = nj.OptimizerConfig(
        grad_clip=0.0, vector_adam_b2=0.5, muon_momentum_warmup_steps=3,
        average_horizon=2, average_start_frac=0.5, total_steps=4, decay_start_frac=1.0,
        use_8bit_optim=True, quant_min_size=1, **settings,
    )  # fmt: skip
    rises = optax.linear_schedule(0.85, 0.95, 3)
    given = nj.muon(
        0.02, bits=8, min_size=1, beta=rises, adam_vector_b2=0.5, average_horizon=2,
        average_start=2, adam_learning_rate=0.003, **settings,
    )  # fmt: skip
    built = nj.build_optimizer(config, PARAMS)
    states = [train(tx, 3, PARAMS)[0] for tx in (built, given)]
    chex.assert_trees_all_close(*states, rtol=1e-6)


def test_keys_of_the_adamw_part_are_for_their_parameters():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    config = nj.OptimizerConfig(
        fallback_lr=1.0, lr=1.0, weight_decay=0.5, fallback_weight_decay=0.125,
        weight_decay_schedule="linear", total_steps=4, decay_start_frac=1.0,
        groups=(Group("up/bias", weight_decay=0.25),), ns_steps=1,
    )  # fmt: skip
    tx = nj.build_optimizer(config, PARAMS)
    state = tx.init(PARAMS)
    for left in (1.0, 0.75, 0.5):
        updates, state = jax.jit(tx.update)(zeros, state, PARAMS)
        part = jax.tree.map(lambda u, p: float(jnp.mean(-u / p)), updates, PARAMS)
        found = part["embed"]["embedding"], part["up"]["kernel"], part["up"]["bias"]
        np.testing.assert_allclose(
            found, np.array([0.125, 0.5, 0.25]) * left, rtol=1e-5
        )
