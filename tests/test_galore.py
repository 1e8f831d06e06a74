"""The laws of `galore`, on params that truly enter the low-rank branch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
import nanochat_jax as nj

PARAMS = {"wide": jnp.zeros((8, 40)), "tall": jnp.zeros((2, 40, 8))}
ALWAYS = {"min_saving": -float("inf")}


def grads(step=0, rank=8):
    def leaf(i, x):
        k1, k2 = jax.random.split(jax.random.key(10 * step + i))
        m, n = x.shape[-2:]
        left = jax.random.normal(k1, (*x.shape[:-2], m, rank))
        return left @ jax.random.normal(k2, (*x.shape[:-2], rank, n))

    return {name: leaf(i, x) for i, (name, x) in enumerate(PARAMS.items())}


def trajectory(tx, gradients, params=PARAMS):
    state, update, out = tx.init(params), jax.jit(tx.update), []
    for g in gradients:
        updates, state = update(g, state, params)
        out.append(updates)
    return out, state


def projections(state):
    """`PPᵀ` of each leaf, which does not depend on signs and rotations."""
    return jax.tree.map(lambda p: p @ p.mT, state.projector)


def assert_orthonormal(state):
    for p in jax.tree.leaves(state.projector):
        eye = jnp.broadcast_to(jnp.eye(p.shape[-1]), (*p.shape[:-2], *p.shape[-1:] * 2))
        helpers.assert_close(p.mT @ p, eye)


@pytest.mark.parametrize("inner", [nj.momentum, helpers.muon], ids=["momentum", "muon"])
def test_at_full_rank_it_is_the_inner_transform_across_refreshes(inner):
    gradients = [grads(step) for step in range(5)]
    tx = nj.galore(inner(), rank=8, refresh_every=2, **ALWAYS)
    updates, state = trajectory(tx, gradients)
    expected, _ = trajectory(inner(), gradients)
    assert all(p is not None for p in state.projector.values())
    helpers.assert_close(updates, expected, atol=2e-4)


def test_without_reprojection_the_law_fails():
    """So the test above can: moments kept in the old basis give other updates."""
    gradients = [grads(step) for step in range(5)]
    kwargs = {"rank": 8, "refresh_every": 2, **ALWAYS}
    kept, _ = trajectory(nj.galore(nj.momentum(), reproject=(), **kwargs), gradients)
    moved, _ = trajectory(nj.galore(nj.momentum(), **kwargs), gradients)
    assert jnp.abs(kept[-1]["wide"] - moved[-1]["wide"]).max() > 0.1


def test_orthogonalize_may_stand_inside_or_outside():
    gradients = [grads(step) for step in range(3)]
    inside = nj.galore(helpers.muon(), rank=3, refresh_every=2)
    outside = optax.chain(
        nj.galore(nj.momentum(), rank=3, refresh_every=2), nj.orthogonalize()
    )
    a, _ = trajectory(inside, gradients)
    b, _ = trajectory(outside, gradients)
    helpers.assert_close(a, b, atol=1e-4)


def test_residual_gives_back_what_the_projector_cuts_off():
    whole = nj.galore(optax.identity(), rank=3, residual=1.0)
    updates, _ = trajectory(whole, [grads()])
    helpers.assert_close(updates[0], grads(), atol=1e-4)
    half = nj.galore(optax.identity(), rank=3, residual=0.5)
    cut = nj.galore(optax.identity(), rank=3)
    u, v = (trajectory(tx, [grads()])[0][0] for tx in (half, cut))
    expected = jax.tree.map(lambda v, g: v + 0.5 * (g - v), v, grads())
    helpers.assert_close(u, expected, atol=1e-4)


def test_a_residual_matched_in_norm_is_as_large_as_the_inner_update_makes_it():
    """With an inner transform that only scales, it is that scale times the rest."""
    g, kwargs = grads(), {"rank": 3, "residual": 0.5}
    tenfold = nj.galore(optax.scale(10.0), match_norm=True, **kwargs)
    (updates,), _ = trajectory(tenfold, [g])
    (plain,), _ = trajectory(nj.galore(optax.identity(), **kwargs), [g])
    expected = jax.tree.map(lambda x: 10 * x, plain)
    helpers.assert_close(updates, expected, atol=1e-3)
    zero = jax.tree.map(jnp.zeros_like, g)
    helpers.assert_close(trajectory(tenfold, [zero])[0][0], zero)


def test_with_residual_the_orthogonalised_update_has_full_rank():
    gradients = [grads(step) for step in range(2)]
    plain = optax.chain(nj.galore(nj.momentum(), 3), nj.orthogonalize())
    joint = optax.chain(nj.galore(nj.momentum(), 3, residual=1.0), nj.orthogonalize())
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
    tx = nj.galore(nj.momentum(), rank=3, refresh_every=3)
    state, update, seen = tx.init(PARAMS), jax.jit(tx.update), []
    for step in range(7):
        _, state = update(grads(step), state, PARAMS)
        seen.append(projections(state)["wide"])
    changed = [bool(jnp.abs(b - a).max() > 1e-3) for a, b in itertools.pairwise(seen)]
    assert changed == [False, False, True, False, False, True]
    assert_orthonormal(state)


def test_staggered_leaves_refresh_in_turn_and_each_once_a_period():
    params = {f"w{i}": jnp.zeros((8, 40)) for i in range(4)}
    tx = nj.galore(nj.momentum(), rank=3, refresh_every=4, refresh_stagger=True)
    state, update, changes = tx.init(params), jax.jit(tx.update), []
    for step in range(9):
        keys = jax.random.split(jax.random.key(step), 4)
        g = {f"w{i}": jax.random.normal(key, (8, 40)) for i, key in enumerate(keys)}
        before = projections(state)
        _, state = update(g, state, params)
        now = projections(state)
        changes.append([bool(jnp.abs(now[k] - before[k]).max() > 1e-3) for k in now])
    changes = np.array(changes)
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


def test_adaptive_leaves_are_refreshed_early_when_they_turn_and_late_when_they_stand():
    """One leaf stays in its space throughout, the other leaves it at step 6."""
    k = jax.random.key(0)
    still, other = (jax.random.normal(jax.random.fold_in(k, i), (8, 2)) for i in (0, 1))

    def gradient(step):
        noise = jax.random.normal(jax.random.fold_in(k, 10 + step), (2, 40))
        turned = other if step >= 6 else still
        return {"still": still @ noise, "turned": turned @ noise}

    params = {"still": jnp.zeros((8, 40)), "turned": jnp.zeros((8, 40))}
    rule = nj.Adaptive(drop=0.9, still=0.9, longest=4, shortest=0.25, decay=0.0)
    tx = nj.galore(nj.momentum(), rank=2, refresh_every=4, adaptive=rule)
    # Two bases of one space have the same projection, so turning shows, standing not.
    steps, state = refreshes(tx, [gradient(step) for step in range(9)], params)
    assert ["turned" in s for s in steps] == [True] + 6 * [False] + [True, False]
    assert int(state.adaptive.interval["still"]) == 8  # doubled at step 4
    assert int(state.adaptive.interval["turned"]) == 4  # doubled, and set back
    assert int(state.adaptive.due["still"]) == 12
    assert float(state.adaptive.captured["still"]) > 0.99
    assert_orthonormal(state)


@helpers.on_processors
def test_without_a_fall_or_a_stand_adaptive_refreshing_is_periodic():
    never = nj.Adaptive(drop=0.0, still=1.0)
    gradients = [grads(step) for step in range(7)]
    plain = nj.galore(nj.momentum(), rank=3, refresh_every=3)
    adaptive = nj.galore(nj.momentum(), rank=3, refresh_every=3, adaptive=never)
    a, _ = trajectory(plain, gradients)
    b, _ = trajectory(adaptive, gradients)
    helpers.assert_close(a, b, atol=0, rtol=0)


def test_a_warm_start_needs_no_sketch_and_follows_the_gradient():
    """From the basis before, one product with `GGᵀ` is as good as a fresh sketch."""
    g = {"w": helpers.matrix_with_spectrum((32, 96), np.arange(1, 33) ** -0.5)}
    best = np.sum(1 / np.arange(1, 9))

    def captured(**kwargs):
        tx = nj.galore(optax.identity(), rank=8, refresh_every=1, **kwargs)
        updates, _ = trajectory(tx, [g] * 4, g)
        return float(jnp.sum(updates[-1]["w"] ** 2)) / best

    warm = captured(warm_start=True, power_steps=1)
    assert warm > 0.98
    assert warm > captured(power_steps=1)


def test_ranks_are_numbers_fractions_or_by_role():
    shapes = {"attention": (8, 64), "ffn": (16, 64), "bias": (64,)}
    params = {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}
    ranks = lambda rank: {
        name: p["kernel"].shape[-1]
        for name, p in nj.galore(nj.momentum(), rank, **ALWAYS)
        .init(params)
        .projector.items()
        if p["kernel"] is not None
    }
    assert ranks(4) == {"attention": 4, "ffn": 4}
    assert ranks(0.25) == {"attention": 2, "ffn": 4}
    assert ranks({"attention": 3, "*": 0.5}) == {"attention": 3, "ffn": 8}
    assert ranks({"ffn/kernel": 2, "*": 1}) == {"attention": 1, "ffn": 2}


@pytest.mark.parametrize("poison", [0.0, jnp.nan, jnp.inf])
def test_a_useless_gradient_at_a_refresh_keeps_the_old_basis(poison):
    tx = nj.galore(nj.momentum(), rank=3, refresh_every=1)
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
        refresh_every=200,
        scale=0.25,
        power_steps=4,
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
    project = lambda **kwargs: {
        name
        for name, p in nj.galore(nj.momentum(), **kwargs).init(params).projector.items()
        if p is not None
    }
    assert project(rank=4) == {"wide"}  # 4 (8 + 8) = 8 x 8 saves nothing
    assert project(rank=3) == {"square", "wide"}
    assert project(rank=4, projector_cost=0.5) == {"square", "wide"}
    assert project(rank=4, projector_dtype="bfloat16") == {"square", "wide"}
    assert project(rank=4, min_saving=0.5) == set()
    assert project(rank=100, **ALWAYS) == {"square", "wide"}


def test_state_is_low_rank():
    state = nj.galore(optax.scale_by_adam(), rank=3).init(PARAMS)
    assert state.projector["tall"].shape == (2, 8, 3)
    assert state.inner.mu["tall"].shape == (2, 3, 40)
    assert state.inner.nu["wide"].shape == (3, 40)


def test_the_rest_may_have_a_transform_of_its_own():
    """Momentum in the basis and momentum of the rest are momentum, as bases change."""
    bias = {"bias": jnp.ones(5)}
    gradients = [grads(step) | bias for step in range(4)]
    follow = lambda tx: trajectory(tx, gradients, PARAMS | bias)
    kwargs = {"rank": 3, "refresh_every": 2, "residual": 1.0}
    split = nj.galore(nj.momentum(0.8), rest=nj.momentum(0.8), **kwargs)
    whole, _ = follow(nj.momentum(0.8))
    updates, state = follow(split)
    helpers.assert_close(updates, whole)
    assert state.rest.momentum["tall"].shape == PARAMS["tall"].shape
    assert state.rest.momentum["bias"] is None
    kwargs["refresh_every"] = 100
    short = nj.galore(nj.momentum(0.8), rest=nj.momentum(0.0), **kwargs)
    none = nj.galore(nj.momentum(0.8), **kwargs)
    helpers.assert_close(follow(short)[0], follow(none)[0])


def test_a_basis_may_be_that_of_the_momentum():
    """Noise has averaged out of it, where one gradient is mostly noise."""
    signal = helpers.matrix_with_spectrum((16, 48), np.ones(4))
    noise = lambda i: 0.15 * jax.random.normal(jax.random.key(i), signal.shape)
    gradients = [{"w": signal + noise(i)} for i in range(12)]

    def captured(**kwargs):
        tx = nj.galore(nj.momentum(0.8), 4, refresh_every=1, seed=1, **kwargs)
        _, state = trajectory(tx, gradients, gradients[0])
        return float(jnp.sum((state.projector["w"].mT @ signal) ** 2)) / 4

    assert captured(momentum_share=0.8) > captured() + 0.02


def test_the_seed_decides_the_sketch():
    g = grads()
    trajectories = [
        trajectory(nj.galore(optax.identity(), 3, seed=seed, power_steps=1), [g])[0]
        for seed in (0, 0, 1)
    ]
    helpers.assert_close(trajectories[0], trajectories[1], atol=0, rtol=0)
    assert jnp.abs(trajectories[0][0]["wide"] - trajectories[2][0]["wide"]).max() > 1e-3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nj.galore(nj.momentum(), jnp.int32(4)), TypeError, "static_args"),
        (lambda: nj.galore(nj.momentum(), 0), ValueError, "rank=0"),
        (lambda: nj.galore(nj.momentum(), 1.5), ValueError, "rank=1.5"),
        (
            lambda: nj.galore(nj.momentum(), {"ffn": 2}).init(PARAMS),
            ValueError,
            r"\['ffn'\], none of which(.|\n)*tall(.|\n)*wide",
        ),
        (
            lambda: nj.galore(
                nj.momentum(), 4, adaptive=nj.Adaptive(), refresh_stagger=True
            ),
            ValueError,
            "Give one of them",
        ),
        (lambda: nj.Adaptive(drop=2.0, decay=1.0), ValueError, "drop=2.0, decay=1.0"),
        (
            lambda: nj.galore(nj.momentum(), 4, refresh_every=0),
            ValueError,
            "refresh_every=0",
        ),
        (
            lambda: nj.galore(nj.momentum(), 4, rest=nj.momentum()),
            ValueError,
            "Give a `residual`",
        ),
        (
            lambda: nj.galore(nj.momentum(), 4, power_steps=0),
            ValueError,
            "power_steps=0",
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
