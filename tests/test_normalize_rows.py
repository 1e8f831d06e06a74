"""The laws of `normalize_rows`: NorMuon after, MuonEq before, Muon+ after."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
import nanochat_jax as nj
from nanochat_jax.transforms import normalize_rows

SHAPES = {"wide": (8, 24), "tall": (2, 40, 8)}
MODES = [
    {"beta": 0.9}, {"neurons": "fan_in", "beta": 0.9}, {}, {"neurons": "fan_in"},
    {"neurons": "both"},
]  # fmt: skip
every_mode = pytest.mark.parametrize("mode", MODES, ids=str)


def grads(step=0, scale=1.0):
    """Random updates, the neurons of which differ in size."""

    def leaf(i, shape):
        key = jax.random.fold_in(jax.random.key(step), i)
        sizes = jnp.exp(jax.random.normal(jax.random.fold_in(key, 1), shape[-1:]))
        return scale * jax.random.normal(key, shape) * jnp.broadcast_to(sizes, shape)

    return {name: leaf(i, shape) for i, (name, shape) in enumerate(SHAPES.items())}


def run(tx, gradients):
    state, out, update = tx.init(gradients[0]), [], jax.jit(tx.update)
    for g in gradients:
        updates, state = update(g, state)
        out.append(updates)
    return out, state


def norm(x, axis=(-2, -1)):
    return np.sqrt(np.sum(np.asarray(x, np.float64) ** 2, axis=axis))


@every_mode
def test_the_norm_of_each_matrix_is_kept(mode):
    gradients = [grads(step) for step in range(3)]
    for updates, g in zip(
        run(normalize_rows(**mode), gradients)[0], gradients, strict=True
    ):
        for name in SHAPES:
            np.testing.assert_allclose(norm(updates[name]), norm(g[name]), rtol=1e-5)


@pytest.mark.parametrize(("neurons", "axis"), [("fan_out", -2), ("fan_in", -1)])
def test_without_an_average_all_neurons_are_equal(neurons, axis):
    [updates], _ = run(normalize_rows(neurons), [grads()])
    for x in updates.values():
        sizes = norm(x, axis)
        np.testing.assert_allclose(sizes, sizes[..., :1] * np.ones_like(sizes), 1e-5)


def reference(x, v, beta):
    """NorMuon on `[out, in]` weights in float64: algorithm 1, with the norm kept."""
    v = beta * v + (1 - beta) * np.mean(x**2, axis=1)
    scaled = x / np.sqrt(v)[:, None]
    return scaled * np.linalg.norm(x) / np.linalg.norm(scaled), v


def test_with_an_average_it_is_normuon():
    gradients = [grads(step) for step in range(4)]
    out, state = run(normalize_rows(beta=0.9), gradients)
    v = np.zeros(24)
    for updates, g in zip(out, gradients, strict=True):
        expected, v = reference(np.asarray(g["wide"], np.float64).T, v, 0.9)
        np.testing.assert_allclose(updates["wide"], expected.T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.row_moment["wide"], v, rtol=1e-5)
    assert state.row_moment["tall"].shape == (2, 8)


def test_by_both_norms_at_once_it_is_the_two_sided_muoneq():
    [updates], _ = run(normalize_rows("both"), [grads()])
    x = np.asarray(grads()["wide"], np.float64)
    expected = x / norm(x, 0) / norm(x, 1)[:, None]
    expected *= np.linalg.norm(x) / np.linalg.norm(expected)
    np.testing.assert_allclose(updates["wide"], expected, rtol=1e-4, atol=1e-6)


@every_mode
def test_scale_passes_through_and_a_stack_is_its_matrices(mode):
    tx = normalize_rows(**mode)
    gradients = [grads(step) for step in range(2)]
    (_, last), _ = run(tx, gradients)
    (_, tiny), _ = run(tx, [grads(step, 2.0**-40) for step in range(2)])
    helpers.assert_close(jax.tree.map(lambda x: x * 2.0**40, tiny), last, rtol=1e-4)
    second = [{"tall": g["tall"][1]} for g in gradients]
    (_, alone), _ = run(tx, second)
    helpers.assert_close(alone["tall"], last["tall"][1])


@every_mode
def test_zeros_stay_zero_and_a_fault_is_seen_but_not_kept(mode):
    zeros = optax.tree.zeros_like(grads())
    faulty = jax.tree.map(lambda x: x.at[..., 0, 0].set(jnp.nan), grads())
    out, state = run(normalize_rows(**mode), [zeros, faulty, grads()])
    assert not any(np.any(x) for x in out[0].values())
    assert all(np.isnan(x).any() for x in out[1].values())
    for x in jax.tree.leaves((out[2], state)):
        assert np.isfinite(x).all()


def test_sizes_before_orthogonalisation_do_not_reach_the_update_of_muoneq():
    tx = optax.chain(normalize_rows(), nj.orthogonalize(dtype="float32"))
    g = grads()
    louder = {
        k: np.linspace(0.1, 3.0, x.shape[-1]) * np.asarray(x) for k, x in g.items()
    }
    louder = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), louder)
    [a], _ = run(tx, [g])
    [b], _ = run(tx, [louder])
    helpers.assert_close(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: normalize_rows("rows"), "`neurons` must be one of .*got 'rows'"),
        (lambda: normalize_rows("both", beta=0.9), "Leave `beta` out"),
        (
            lambda: normalize_rows().init({"a": jnp.ones(3), "b": jnp.ones(4)}),
            r"\['a'\] has shape \(3,\)\n.*\['b'\](.|\n)*optax.partition",
        ),
    ],
)
def test_messages_say_what_is_required(make, message):
    with pytest.raises(ValueError, match=message):
        make()
