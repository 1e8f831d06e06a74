"""The laws of `galore`, on params that truly enter the low-rank branch."""

import functools
import itertools
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
import nanochat_jax as nj
from nanochat_jax.transforms import saves_bytes
from nanochat_jax.transforms.galore.projection import project

PARAMS = {"wide": jnp.zeros((8, 40)), "tall": jnp.zeros((2, 40, 8))}
ALWAYS = {"project": lambda shape, rank: True}


def grads(step=0, rank=8):
    def leaf(i, x):
        k1, k2 = jax.random.split(jax.random.key(10 * step + i))
        m, n = x.shape[-2:]
        left = jax.random.normal(k1, (*x.shape[:-2], m, rank))
        return left @ jax.random.normal(k2, (*x.shape[:-2], rank, n))

    return {name: leaf(i, x) for i, (name, x) in enumerate(PARAMS.items())}


every = nj.RandomizedSVD


def trajectory(tx, gradients, params=PARAMS):
    state, update, out = tx.init(params), jax.jit(tx.update), []
    for g in gradients:
        updates, state = update(g, state, params)
        out.append(updates)
    return out, state


def projections(state):
    """`PPᵀ` of each leaf, which does not depend on signs and rotations."""
    return jax.tree.map(lambda p: p @ p.mT, state.basis)


def assert_orthonormal(state):
    for p in jax.tree.leaves(state.basis):
        eye = jnp.broadcast_to(jnp.eye(p.shape[-1]), (*p.shape[:-2], *p.shape[-1:] * 2))
        helpers.assert_close(p.mT @ p, eye)


@pytest.mark.parametrize("inner", [nj.momentum, helpers.muon], ids=["momentum", "muon"])
def test_at_full_rank_it_is_the_inner_transform_across_refreshes(inner):
    gradients = [grads(step) for step in range(5)]
    tx = nj.galore(inner(), rank=8, basis=every(2), **ALWAYS)
    updates, state = trajectory(tx, gradients)
    expected, _ = trajectory(inner(), gradients)
    assert all(p is not None for p in state.basis.values())
    helpers.assert_close(updates, expected, atol=2e-4)


def test_without_reprojection_the_law_fails():
    """So the test above can: moments kept in the old basis give other updates."""
    gradients = [grads(step) for step in range(5)]
    kwargs = {"rank": 8, "basis": every(2), **ALWAYS}
    kept, _ = trajectory(nj.galore(nj.momentum(), reproject=(), **kwargs), gradients)
    moved, _ = trajectory(nj.galore(nj.momentum(), **kwargs), gradients)
    assert jnp.abs(kept[-1]["wide"] - moved[-1]["wide"]).max() > 0.1


def test_orthogonalize_may_stand_inside_or_outside():
    gradients = [grads(step) for step in range(3)]
    inside = nj.galore(helpers.muon(), rank=3, basis=every(2))
    outside = optax.chain(
        nj.galore(nj.momentum(), rank=3, basis=every(2)),
        nj.orthogonalize(dtype="float32"),
    )
    a, _ = trajectory(inside, gradients)
    b, _ = trajectory(outside, gradients)
    helpers.assert_close(a, b, atol=1e-4)


def test_residual_gives_back_what_the_projector_cuts_off():
    whole = nj.galore(optax.identity(), rank=3, complement=1.0)
    updates, _ = trajectory(whole, [grads()])
    helpers.assert_close(updates[0], grads(), atol=1e-4)
    half = nj.galore(optax.identity(), rank=3, complement=0.5)
    cut = nj.galore(optax.identity(), rank=3)
    u, v = (trajectory(tx, [grads()])[0][0] for tx in (half, cut))
    expected = jax.tree.map(lambda v, g: v + 0.5 * (g - v), v, grads())
    helpers.assert_close(u, expected, atol=1e-4)


def test_with_residual_the_orthogonalised_update_has_full_rank():
    gradients = [grads(step) for step in range(2)]
    plain = optax.chain(nj.galore(nj.momentum(), 3), nj.orthogonalize(dtype="float32"))
    joint = optax.chain(
        nj.galore(nj.momentum(), 3, complement=1.0), nj.orthogonalize(dtype="float32")
    )
    a, b = (trajectory(tx, gradients)[0][-1]["wide"] for tx in (plain, joint))
    assert jnp.linalg.matrix_rank(a, rtol=1e-3) == 3
    assert jnp.linalg.matrix_rank(b, rtol=1e-3) == 8


def test_exactly_low_rank_gradients_pass_whole_and_stacks_are_their_matrices():
    g = grads(rank=2)
    tx = nj.galore(optax.identity(), rank=3)
    (updates,), _ = trajectory(tx, [g])
    helpers.assert_close(updates, g, atol=1e-4)
    single = {"tall": PARAMS["tall"][1]}
    (update,), _ = trajectory(tx, [{"tall": g["tall"][1]}], single)
    helpers.assert_close(update["tall"], updates["tall"][1], atol=1e-4)


def test_the_basis_changes_on_refresh_steps_only():
    tx = nj.galore(nj.momentum(), rank=3, basis=every(3))
    state, update, seen = tx.init(PARAMS), jax.jit(tx.update), []
    for step in range(7):
        _, state = update(grads(step), state, PARAMS)
        seen.append(projections(state)["wide"])
    changed = [bool(jnp.abs(b - a).max() > 1e-3) for a, b in itertools.pairwise(seen)]
    assert changed == [False, False, True, False, False, True]
    assert_orthonormal(state)


class Staggered(nj.RandomizedSVD):
    """Leaves take turns, by a hash of their path."""

    def is_due(self, count, path, gradient, basis):
        turn = zlib.crc32(path.encode()) % self.refresh_every
        return (count + turn) % self.refresh_every == 0


def test_a_rule_may_let_leaves_take_turns():
    params = {f"w{i}": jnp.zeros((8, 40)) for i in range(4)}
    tx = nj.galore(nj.momentum(), rank=3, basis=Staggered(4))
    normal = lambda step, i: jax.random.normal(jax.random.key(8 * step + i), (8, 40))
    gradients = [{f"w{i}": normal(step, i) for i in range(4)} for step in range(9)]
    steps, _ = refreshes(tx, gradients, params)
    changes = np.array([[name in found for name in params] for found in steps])
    assert changes[0].all()  # no basis is left as it was made
    assert (changes[1:5].sum(0) == 1).all()
    assert (changes[5:9] == changes[1:5]).all()
    assert not changes[1:5].all(1).any()


def refreshes(tx, gradients, params):
    """Returns at which steps the basis of each leaf was renewed, and the state."""
    state, update, steps = tx.init(params), jax.jit(tx.update), []
    for g in gradients:
        before = projections(state)
        _, state = update(g, state, params)
        now = projections(state)
        steps.append({k for k in now if jnp.abs(now[k] - before[k]).max() > 1e-3})
    return steps, state


class ByEnergy(nj.RandomizedSVD):
    """A leaf is due when its basis captures too little of its gradient."""

    def is_due(self, count, path, gradient, basis):
        return jnp.sum((basis.mT @ gradient) ** 2) < 0.9 * jnp.sum(gradient**2)


def test_a_rule_may_look_at_the_energy_captured():
    """One leaf stays in its space throughout, the other leaves it at step 4."""
    k = jax.random.key(0)
    still, other = (jax.random.normal(jax.random.fold_in(k, i), (8, 2)) for i in (0, 1))

    def gradient(step):
        noise = jax.random.normal(jax.random.fold_in(k, 10 + step), (2, 40))
        return {
            "still": still @ noise,
            "turned": (other if step > 3 else still) @ noise,
        }

    params = {"still": jnp.zeros((8, 40)), "turned": jnp.zeros((8, 40))}
    tx = nj.galore(nj.momentum(), rank=2, basis=ByEnergy())
    steps, state = refreshes(tx, [gradient(step) for step in range(7)], params)
    both, one = {"still", "turned"}, {"turned"}
    assert steps == [both, set(), set(), set(), one, set(), set()]
    assert_orthonormal(state)


class WarmStart(nj.RandomizedSVD):
    """One power iteration from the basis before, in place of a sketch."""

    def find(self, gradient, basis, momentum, key):
        return jnp.linalg.qr(gradient @ (gradient.mT @ basis)).Q


def test_a_rule_may_begin_from_the_basis_before():
    g = {"w": helpers.matrix_with_spectrum((32, 96), np.arange(1, 33) ** -0.5)}
    best = np.sum(1 / np.arange(1, 9))

    def captured(rule):
        tx = nj.galore(optax.identity(), rank=8, basis=rule)
        updates, _ = trajectory(tx, [g] * 8, g)
        return float(jnp.sum(updates[-1]["w"] ** 2)) / best

    assert captured(WarmStart(1)) > 0.98
    assert captured(WarmStart(100)) < 0.9  # after one iteration


def test_ranks_are_numbers_or_fractions():
    params = {"square": jnp.zeros((8, 64)), "tall": jnp.zeros((64, 16))}
    ranks = lambda rank: {
        name: p.shape[-1]
        for name, p in nj.galore(nj.momentum(), rank, **ALWAYS)
        .init(params)
        .basis.items()
    }
    assert ranks(4) == {"square": 4, "tall": 4}
    assert ranks(0.25) == {"square": 2, "tall": 4}
    assert ranks(100) == {"square": 8, "tall": 16}


@pytest.mark.parametrize("poison", [0.0, jnp.nan, jnp.inf])
def test_a_useless_gradient_at_a_refresh_keeps_the_old_basis(poison):
    tx = nj.galore(nj.momentum(), rank=3, basis=every(1))
    update = jax.jit(tx.update)
    _, state = update(grads(0), tx.init(PARAMS), PARAMS)
    bad = grads(1)
    bad["wide"] = bad["wide"].at[0, 0].set(poison) if poison else 0 * bad["wide"]
    bad["tall"] = bad["tall"].at[1].set(poison)  # the other matrix of the stack is fine
    _, after = update(bad, state, PARAMS)
    before, now = projections(state), projections(after)
    helpers.assert_close(now["wide"], before["wide"])
    helpers.assert_close(now["tall"][1], before["tall"][1])
    assert jnp.abs(now["tall"][0] - before["tall"][0]).max() > 1e-3
    assert_orthonormal(after)


@pytest.mark.parametrize("poison", [0.0, jnp.nan])
def test_a_useless_first_gradient_leaves_an_orthonormal_basis(poison):
    tx = nj.galore(nj.momentum(), rank=3)
    bad = jax.tree.map(lambda x: jnp.full_like(x, poison), PARAMS)
    _, state = tx.update(bad, tx.init(PARAMS), PARAMS)
    assert_orthonormal(state)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_gradient_does_not_matter(scale):
    tx = nj.galore(helpers.muon(), rank=3)
    (expected,), _ = trajectory(tx, [grads()])
    (updates,), _ = trajectory(tx, [jax.tree.map(lambda g: g * scale, grads())])
    helpers.assert_close(updates, expected, atol=1e-3)


def test_projected_gradients_capture_the_leading_directions():
    g = helpers.matrix_with_spectrum((32, 96), np.arange(1, 33) ** -0.5)
    tx = nj.galore(optax.identity(), rank=8)
    (u,), _ = trajectory(tx, [{"w": g}], {"w": g})
    best = np.sum(1 / np.arange(1, 9))
    assert 0.97 * best < jnp.sum(u["w"] ** 2) <= 1.0001 * best


def test_galore_adam_is_the_published_method():
    """Zhao et al. (2024), algorithm 2, with an exact decomposition, in NumPy.

    The spectrum is well separated, so that singular vectors agree up to sign, under
    which Adam's elementwise step does not change.
    """
    rng = np.random.default_rng(0)
    directions = helpers.matrix_with_spectrum((16, 48), 2.0 ** -np.arange(16))
    gradients = [
        np.asarray(directions) + 1e-3 * rng.normal(size=(16, 48)) for _ in range(4)
    ]
    tx = nj.galore(
        optax.scale_by_adam(0.9, 0.999, 1e-8),
        rank=4,
        scale=0.25,
        basis=nj.RandomizedSVD(power_iterations=4),
        reproject=(),
    )
    jaxed = [{"w": jnp.asarray(g, jnp.float32)} for g in gradients]
    updates, _ = trajectory(tx, jaxed, jaxed[0])
    basis = np.linalg.svd(gradients[0])[0][:, :4]
    m = v = np.zeros((4, 48))
    for t, g in enumerate(gradients, start=1):
        low = basis.T @ g
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low**2
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        expected = 0.25 * basis @ step
        got = updates[t - 1]["w"]
        assert np.linalg.norm(got - expected) < 0.02 * np.linalg.norm(expected)


def test_leaves_that_would_not_save_memory_stay_full_rank():
    shapes = {"square": (8, 8), "wide": (8, 64), "bias": (64,)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    projected = lambda **kwargs: {
        name
        for name, p in nj.galore(nj.momentum(), **kwargs).init(params).basis.items()
        if p is not None
    }
    assert projected(rank=4) == {"wide"}  # 4 (8 + 8) = 8 x 8 saves nothing
    assert projected(rank=3) == {"square", "wide"}
    cheap = functools.partial(saves_bytes, basis_cost=0.5)
    assert projected(rank=4, project=cheap) == {"square", "wide"}
    assert projected(rank=4, project=lambda shape, rank: rank > 4) == set()
    assert projected(rank=100, **ALWAYS) == {"square", "wide"}


def test_state_is_low_rank():
    state = nj.galore(optax.scale_by_adam(), rank=3).init(PARAMS)
    assert state.basis["tall"].shape == (2, 8, 3)
    assert state.inner.mu["tall"].shape == (2, 3, 40)
    assert state.inner.nu["wide"].shape == (3, 40)


def test_the_complement_may_have_a_transform_of_its_own():
    """Momentum in the basis and of the complement are momentum, as bases change."""
    bias = {"bias": jnp.ones(5)}
    gradients = [grads(step) | bias for step in range(4)]
    follow = lambda tx: trajectory(tx, gradients, PARAMS | bias)
    make = lambda complement, steps: nj.galore(
        nj.momentum(0.8), 3, complement=complement, basis=every(steps)
    )
    whole, _ = follow(nj.momentum(0.8))
    updates, state = follow(make(nj.momentum(0.8), 2))
    helpers.assert_close(updates, whole)
    assert state.complement.momentum["tall"].shape == PARAMS["tall"].shape
    assert state.complement.momentum["bias"] is None
    short, none = make(nj.momentum(0.0), 100), make(1.0, 100)
    helpers.assert_close(follow(short)[0], follow(none)[0])
    half = optax.chain(nj.momentum(0.0), optax.scale(0.5))
    helpers.assert_close(follow(make(half, 100))[0], follow(make(0.5, 100))[0])


@pytest.mark.parametrize("inner", [optax.identity(), optax.scale_by_rms()])
def test_a_complement_with_moments_goes_with_an_inner_transform_without(inner):
    tx = nj.galore(inner, 3, complement=nj.momentum(0.5), basis=every(2))
    updates, state = trajectory(tx, [grads(step) for step in range(3)])
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))
    expected, _ = trajectory(
        nj.galore(inner, 3, basis=every(2)), [grads(step) for step in range(3)]
    )
    within = jax.tree.map(project, updates[-1], state.basis)
    helpers.assert_close(within, jax.tree.map(project, expected[-1], state.basis))


class OfMomentum(nj.RandomizedSVD):
    """Directions mostly of the momentum, out of which noise has averaged."""

    def find(self, gradient, basis, momentum, key):
        mixed = 0.2 * gradient + 0.8 * momentum
        return super().find(mixed, basis, momentum, key)


def test_a_rule_may_look_at_the_momentum():
    signal = helpers.matrix_with_spectrum((16, 48), np.ones(4))
    noise = lambda i: 0.15 * jax.random.normal(jax.random.key(i), signal.shape)
    gradients = [{"w": signal + noise(i)} for i in range(12)]

    def captured(rule):
        tx = nj.galore(nj.momentum(0.8), 4, basis=rule(1, seed=1))
        _, state = trajectory(tx, gradients, gradients[0])
        return float(jnp.sum((state.basis["w"].mT @ signal) ** 2)) / 4

    assert captured(OfMomentum) > captured(nj.RandomizedSVD) + 0.02


def test_two_refreshes_of_one_gradient_use_two_sketches():
    """One power iteration leaves a trace of the sketch in the basis."""
    rule = nj.RandomizedSVD(1, power_iterations=1)
    tx = nj.galore(nj.momentum(), rank=3, basis=rule)
    state, update, seen = tx.init(PARAMS), jax.jit(tx.update), []
    for _ in range(2):
        _, state = update(grads(), state, PARAMS)
        seen.append(projections(state))
    assert jnp.abs(seen[0]["wide"] - seen[1]["wide"]).max() > 1e-3


def test_the_seed_decides_the_sketch():
    g, rule = grads(), functools.partial(nj.RandomizedSVD, power_iterations=1)
    trajectories = [
        trajectory(nj.galore(optax.identity(), 3, basis=rule(seed=seed)), [g])[0]
        for seed in (0, 0, 1)
    ]
    helpers.assert_close(trajectories[0], trajectories[1], atol=0, rtol=0)
    assert jnp.abs(trajectories[0][0]["wide"] - trajectories[2][0]["wide"]).max() > 1e-3


def step_of(**methods):
    """One update by a rule that is no `RandomizedSVD`, with one method replaced."""
    usual = {
        "is_due": lambda count, path, gradient, basis: count == 0,
        "find": lambda gradient, basis, momentum, key: basis,
    }
    tx = nj.galore(nj.momentum(), 3, basis=types.SimpleNamespace(**usual | methods))
    return tx.update(grads(), tx.init(PARAMS), PARAMS)


def test_a_rule_is_any_object_with_two_methods():
    _, state = step_of()
    assert_orthonormal(state)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nj.galore(nj.momentum(), jnp.int32(4)), TypeError, "static_args"),
        (lambda: nj.galore(nj.momentum(), 0), ValueError, "rank=0"),
        (lambda: nj.galore(nj.momentum(), 1.5), ValueError, "rank=1.5"),
        (lambda: nj.galore(nj.momentum(), {"ffn": 2}), TypeError, "got dict"),
        (lambda: nj.RandomizedSVD(0), ValueError, "refresh_every.*got 0"),
        (
            lambda: nj.galore(
                nj.momentum(), 4, basis=nj.RandomizedSVD, complement=None, project=True
            ),
            TypeError,
            r"`basis`(.|\n)*`complement`.*None(.|\n)*`project`.*True",
        ),
        (
            lambda: nj.galore(nj.momentum(), 4, complement=jnp.ones(2)),
            TypeError,
            "`complement` must be a number",
        ),
        (lambda: step_of(find=lambda *args: jnp.eye(8)), ValueError, r"8, 3\), got"),
        (
            lambda: step_of(is_due=lambda *args: jnp.ones(2, bool)),
            ValueError,
            "one truth value for .*tall",
        ),
        (
            lambda: nj.RandomizedSVD(power_iterations=0),
            ValueError,
            "power_iterations.*got 0",
        ),
        (
            lambda: nj.galore(
                helpers.quantized(nj.momentum(), helpers.INT8), rank=3
            ).init(PARAMS),
            ValueError,
            r"momentum\['tall'\](.|\n)*momentum\['wide'\](.|\n)*around `galore`",
        ),
    ],
)
def test_messages_name_the_argument_the_value_and_the_remedy(make, error, message):
    with pytest.raises(error, match=message):
        make()
