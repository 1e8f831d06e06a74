"""Weights in bfloat16 lose no update: right in the mean, or with further bits."""

import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from orbax.checkpoint import v1 as ocp

import helpers
import nanochat_jax as nj
from nanochat_jax import optimizer
from nanochat_jax.transforms import (
    SplitMasterState,
    master_weights,
    round_updates,
    split_master,
    split_weights,
    stages,
)

LINKS = {
    "round_updates": round_updates,
    "split_master": split_master,
    "split_master(16)": functools.partial(split_master, 16),
}
every = pytest.mark.parametrize("name", LINKS)
both = pytest.mark.parametrize("bits", [8, 16])
BOUND = {8: 2.0**-16, 16: 2.0**-23}
SHAPES = [(7,), (4, 6), (2, 3, 5)]
BF16 = jnp.bfloat16


@functools.cache
def compiled(name):
    """The link and its jitted step, which applies the update too."""
    tx = LINKS[name]()

    def step(params, state, updates, layer=0):
        extra = {"layer": layer} if name == "round_updates" else {}
        updates, state = tx.update(updates, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return tx, jax.jit(step)


def mixed(dtype=BF16):
    """Parameters in bfloat16 beside one in float32 and an absent one."""
    norm = jnp.ones(3)
    return {"a": jnp.ones((4, 6), dtype), "norm": norm, "none": None} | {
        "nested": {"b": jnp.full((2, 3), -0.3, dtype)}
    }


def noise(step, tree, size=1e-3):
    key = jax.random.key(step)
    return jax.tree.map(lambda x: size * jax.random.normal(key, x.shape), tree)


def bits_of(x):
    """The bits of float32 as integers wide enough to add to."""
    return np.asarray(x, np.float32).view(np.uint32).astype(np.int64)


@st.composite
def weights_and_updates(draw, steps=1):
    """Weights and updates, tiny and huge, that turn and cancel weights, and zeros."""
    shape = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = 2.0 ** draw(st.integers(-60, 60))
    weights = (size * rng.normal(size=shape)).astype(np.float32).astype(BF16)
    weights = np.where(rng.random(shape) < 0.2, BF16(0), weights)
    updates = []
    for _ in range(steps):
        ratio = draw(st.sampled_from(["cancel", 0, -20, -12, -9, -6, -1, 1, 8, 40]))
        if ratio == "cancel":
            near = -1 + rng.normal(size=shape) * 2.0 ** -rng.integers(3, 26, shape)
            update = weights.astype(np.float32) * near
        else:
            update = size * 2.0**ratio * rng.normal(size=shape)
        update = np.where(rng.random(shape) < 0.1, 0, update)
        updates.append(update.astype(np.float32))
    return weights, updates


# Stochastic rounding


@given(weights_and_updates(), st.integers(0, 5))
def test_a_rounded_update_lands_on_a_bfloat16_next_to_the_sum(case, count):
    weights, (update,) = case
    tx, step = compiled("round_updates")
    state = tx.init(weights)._replace(count=jnp.int32(count))
    found, state = step(jnp.asarray(weights), state, jnp.asarray(update))
    assert found.dtype == BF16
    assert state.count == count + 1
    total = bits_of(weights.astype(np.float32) + update)
    inner, on_it = total >> 16 << 16, total % 2**16 == 0
    outer = np.where(on_it, inner, inner + 2**16)  # also of the sum's sign
    got = np.where(np.asarray(found) == 0, total >> 31 << 31, bits_of(found))
    assert np.all((got == inner) | (got == outer))


REMAINDERS = np.array([1, 100, 2**14, 2**15, 50_000, 2**16 - 1])


@pytest.mark.parametrize("sign", [1, -1])
def test_the_nearer_of_the_two_is_taken_the_more_often(sign):
    """With the probability of the remainder, from bits that all of it depends on."""
    weights = jnp.full((len(REMAINDERS), 4096), sign * 1.5, BF16)
    update = sign * (REMAINDERS * 2.0**-23)[:, None] * np.ones(weights.shape)
    tx, step = compiled("round_updates")
    up, state, steps = 0, tx.init(weights), 8
    for _ in range(steps):
        found, state = step(weights, state, jnp.asarray(update, jnp.float32))
        up += np.sum(np.asarray(found) != np.asarray(weights), axis=1)
    chance, draws = REMAINDERS / 2**16, steps * 4096
    deviation = np.sqrt(chance * (1 - chance) * draws)
    assert np.all(abs(up - chance * draws) < 4 * deviation + 1)


def test_small_updates_move_the_mean_as_in_float32_where_nearest_never_moves():
    shape, steps, update = (4, 1024), 200, 2.0**-14  # 1/64 of the distance below 1
    weights = jnp.ones(shape, BF16)
    nearest = optax.apply_updates(weights, jnp.full(shape, -update))
    chex.assert_trees_all_equal(nearest, weights)
    tx = round_updates(seed=3)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jnp.full(shape, -update), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = weights, tx.init(weights)
    (found, _), _ = jax.jit(lambda start: jax.lax.scan(step, start, length=steps))(
        start
    )
    # Each step is 0 or one distance `d`: a variance of `d` times the update.
    deviation = np.sqrt(steps * 2.0**-8 * update / weights.size)
    mean = np.mean(np.asarray(found, np.float64))
    assert abs(mean - (1 - steps * update)) < 4 * deviation


def test_rounding_is_keyed_by_seed_step_leaf_and_position():
    weights = {"a": jnp.ones((8, 64), BF16), "b": jnp.ones((8, 64), BF16)}
    update = jax.tree.map(lambda x: jnp.full(x.shape, 2.0**-8), weights)  # halfway

    def drawn(seed, count):
        tx = round_updates(seed)
        state = tx.init(weights)._replace(count=jnp.int32(count))
        up = tx.update(update, state, weights)[0]
        return [np.asarray(x > 0).ravel() for x in up.values()]

    sets = [x for seed in (0, 1) for count in (0, 1) for x in drawn(seed, count)]
    chex.assert_trees_all_equal(drawn(1, 1), sets[-2:])
    rows = [half for x in sets for half in np.split(x, 2)]  # other positions
    for i, x in enumerate(rows):
        for y in rows[:i]:
            assert abs(np.mean(x == y) - 0.5) < 4.5 * 0.5 / 16  # of 256 draws


@pytest.mark.parametrize("size", [1, 2])
def test_an_update_of_layers_is_that_part_of_an_update_of_the_stack(size):
    tx, step = compiled("round_updates")
    stack = {"w": jnp.ones((6, 3, 8), BF16), "b": jnp.ones((6, 5), BF16)}
    updates = noise(0, stack)
    state = tx.init(stack)._replace(count=jnp.int32(4))
    whole, _ = step(stack, state, updates)
    for layer in range(0, 6, size):
        part = lambda tree, i=layer: jax.tree.map(lambda x: x[i : i + size], tree)
        found, _ = step(part(stack), state, part(updates), jnp.int32(layer))
        chex.assert_trees_all_equal(found, part(whole))


# The split master


def oracle(weights, low, update, bits):
    """The sum in float32, its bits as far as they are kept, and the weight nearest."""
    joined = bits_of(weights) + (np.asarray(low, np.int64) << 16 - bits)
    total = joined.astype(np.uint32).view(np.float32) + update
    unit = 2 ** (16 - bits)
    kept = np.round(bits_of(total) / unit).astype(np.int64) * unit  # to even
    short = kept + 2**15 >> 16 << 16
    return total, kept, short.astype(np.uint32).view(np.float32)


def low_of(kept, stored, bits):
    """The low bits that come as near to the sum as they can from a stored weight."""
    most = 2 ** (bits - 1)
    low = np.clip((kept - bits_of(stored)) >> 16 - bits, -most, most - 1)
    return np.where(kept >> 31 == bits_of(stored) >> 31, low, 0)


@both
@given(weights_and_updates(steps=3))
def test_the_master_weight_moves_by_the_update(bits, case):
    weights, updates = case
    tx, step = compiled("split_master" if bits == 8 else "split_master(16)")
    params, state = jnp.asarray(weights), tx.init(weights)
    for update in updates:
        before = np.asarray(master_weights(state, params))
        total, kept, short = oracle(params, state.low_bits, update, bits)
        params, state = step(params, state, jnp.asarray(update))
        after = np.asarray(master_weights(state, params), np.float64)
        largest = np.max([abs(before), abs(update), abs(after)], axis=0)
        assert np.all(abs(after - before - update) <= BOUND[bits] * largest)
        # The nearest weight, if the difference of the two is not rounded itself.
        lands = np.asarray(params, np.float32) == short
        assert np.all(lands | (abs(total) < 2.0**-15 * abs(before)))
        np.testing.assert_array_equal(state.low_bits, low_of(kept, params, bits))


@both
def test_low_bits_are_those_of_the_weight_that_is_stored(bits):
    """It is not the nearest where `new - 1`, in float32, is not exact."""
    low = jnp.full(4, -50 << bits - 8, f"int{bits}")
    weights, state = jnp.ones(4, BF16), SplitMasterState(low)
    master = np.asarray(master_weights(state, weights))
    update = -master - 2.0**-24 * np.array([1, 3, 5, 7], np.float32)
    _, kept, short = oracle(weights, low, update, bits)
    _, step = compiled("split_master" if bits == 8 else "split_master(16)")
    found, state = step(weights, state, jnp.asarray(update))
    assert np.all(np.asarray(found, np.float32) != short)
    np.testing.assert_array_equal(state.low_bits, low_of(kept, found, bits))
    assert np.all(abs(np.asarray(master_weights(state, found))) < 2.0**-20)


@both
def test_a_thousand_small_steps_follow_float32(bits):
    tx, step = compiled("split_master" if bits == 8 else "split_master(16)")
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 6)).astype(BF16)
    params, state = jnp.asarray(start), tx.init(start)
    exact, bound = start.astype(np.float64), 0
    drift = 1e-3 * rng.normal(size=start.shape)  # against one weight in two
    for _ in range(1000):
        update = (drift * rng.exponential(size=start.shape)).astype(np.float32)
        params, state = step(params, state, jnp.asarray(update))
        exact = exact + update
        bound = bound + BOUND[bits] * np.maximum(abs(exact), abs(update))
    after = np.asarray(master_weights(state, params), np.float64)
    assert np.all(abs(after - exact) <= bound * (1 + 1e-3))
    # Rounding to even errs to both sides, so that errors do not add up.
    assert np.mean(abs(after - exact) / bound) < 0.1
    moved = abs(np.asarray(params, np.float64) - exact)
    assert np.all(moved <= 2.0**-8 * abs(exact) + bound)


@both
def test_what_a_compiler_merges_moves_no_bit(bits):
    """A product and a sum are rounded once in a merged kernel, and twice apart."""
    tx = optax.chain(optax.scale(-1 / 3), split_master(bits))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.random.normal(jax.random.key(0), (4096,), BF16)
    grads = jax.random.normal(jax.random.key(1), (4096,))
    args = params, tx.init(params), grads
    with jax.disable_jit():
        expected = step(*args)
    chex.assert_trees_all_equal(jax.jit(step)(*args), expected)


@every
def test_what_is_not_finite_passes_and_leaves_no_low_bits(name):
    tx, step = compiled(name)
    inf, nan = np.inf, np.nan
    weights = jnp.array([1, 1, 1, inf, -inf, inf, nan, 3.38e38, -3.38e38], BF16)
    update = jnp.array([inf, -inf, nan, 1, 1, -inf, 1, 3e38, -3e38], jnp.float32)
    found, state = step(weights, tx.init(weights), update)
    expected = [inf, -inf, nan, inf, -inf, nan, nan, inf, -inf]
    np.testing.assert_array_equal(np.asarray(found, np.float32), expected)
    if "split" in name:
        assert not np.any(state.low_bits)
        np.testing.assert_array_equal(master_weights(state, found), expected)


@both
def test_a_weight_beyond_the_largest_bfloat16_is_infinite_without_low_bits(bits):
    weights = jnp.array([3.39e38, -3.39e38], BF16)
    tx = split_master(bits)
    updates, state = tx.update(jnp.array([1e36, -1e36]), tx.init(weights), weights)
    found = master_weights(state, optax.apply_updates(weights, updates))
    np.testing.assert_array_equal(found, [np.inf, -np.inf])


# Both


@every
def test_an_update_of_zeros_changes_no_weight(name):
    tx, step = compiled(name)
    weights = jnp.array([0, 1, -1.5, 1e-30, 3e38], BF16)
    state = tx.init(weights)
    found, after = step(weights, state, jnp.zeros(5))
    chex.assert_trees_all_equal(found, weights)
    if "split" in name:
        chex.assert_trees_all_equal(after, state)


@every
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
def test_other_parameters_pass_through(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        params, tx = {"w": jnp.ones((2, 3), dtype)}, LINKS[name]()
        updates = noise(0, params)
        found, state = tx.update(updates, tx.init(params), params)
        assert found["w"] is updates["w"]
        assert len(jax.tree.leaves(state)) == (name == "round_updates")


@every
def test_types_are_those_of_init_whatever_the_gradient(name):
    params, tx = mixed(), LINKS[name]()
    state = jax.eval_shape(tx.init, params)
    assert helpers.types(state) == helpers.types(tx.init(params))
    for dtype in ("float32", "bfloat16", "float16", "int32", "float64"):
        with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
            struct = lambda x, d=dtype: jax.ShapeDtypeStruct(x.shape, d)
            grads = jax.tree.map(struct, params)
            updates, after = jax.eval_shape(tx.update, grads, state, params)
        assert helpers.types(after) == helpers.types(state)
        assert updates["a"].dtype == updates["nested"]["b"].dtype == "float32"
        assert updates["norm"].dtype == dtype


@every
def test_a_scan_equals_a_loop_and_writes_over_what_it_is_given(name):
    tx, step = compiled(name)
    params = mixed()
    updates = [noise(i, params) for i in range(3)]
    expected = params, tx.init(params)
    for update in updates:
        expected = step(*expected, update)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *updates)
    scan = lambda params, state, updates: jax.lax.scan(
        lambda carry, update: (step(*carry, update), None), (params, state), updates
    )[0]
    compiled_scan = jax.jit(scan, donate_argnums=(0, 1))
    args = jax.tree.map(jnp.copy, params), tx.init(params), stacked
    plan = compiled_scan.lower(*args).compile().memory_analysis()
    assert plan.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(args[:2]))
    chex.assert_trees_all_equal(compiled_scan(*args), expected)


@every
def test_a_run_goes_on_from_what_was_saved_to_the_bit(name, tmp_path):
    tx, step = compiled(name)
    params = mixed()
    before = step(params, tx.init(params), noise(0, params))
    expected = step(*before, noise(1, params))
    struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    ocp.save(tmp_path / "run", before)
    restored = ocp.load(tmp_path / "run", jax.tree.map(struct, before))
    for saved in (pickle.loads(pickle.dumps(before)), restored):
        chex.assert_trees_all_equal(step(*saved, noise(1, params)), expected)


@every
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_results_are_sharded_as_the_weights(name, kind):
    tx, step = compiled(name)
    kinds = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((1,), ("x",), kinds)
    sharding = jax.NamedSharding(mesh, jax.P(None, "x"))
    plain = jnp.ones((4, 6), BF16)
    params = jax.device_put(plain, sharding)
    updates = jax.device_put(noise(0, plain), sharding)
    found, state = step(params, tx.init(params), updates)
    assert found.sharding.is_equivalent_to(sharding, 2)
    for x in jax.tree.leaves(state):
        assert x.ndim == 0 or x.sharding.is_equivalent_to(sharding, 2)
    expected, _ = step(plain, tx.init(plain), noise(0, plain))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


# Master weights


def by_roles(bits=8):
    labels = {"a": "x", "norm": "y", "none": "x", "nested": "y"}
    return optax.partition(
        {"x": optax.chain(optax.scale(-1.0), split_master(bits)),
         "y": optax.chain(optax.scale(-1.0), split_master(bits))},
        labels,
    )  # fmt: skip


HOLDERS = {
    "alone": lambda: optax.chain(optax.scale(-1.0), split_master()),
    "stages": lambda: stages(rate=optax.scale(-1.0), split=split_master()),
    "partition": by_roles,
    "stored": lambda: optax.chain(
        helpers.quantized(optax.trace(0.0), {"trace": nj.Normal4(8)}),
        optax.scale(-1.0),
        split_master(),
    ),
    "in quantize_state": lambda: helpers.quantized(
        optax.chain(optax.trace(0.0), optax.scale(-1.0), split_master()),
        {"trace": nj.Normal4(8)},
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(HOLDERS["stages"](), 2),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_master_weights_are_found_wherever_they_are(name):
    tx, params = HOLDERS[name](), mixed()
    grads = noise(0, params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    shapes = jax.eval_shape(master_weights, state, params)
    found = master_weights(state, params)
    assert helpers.types(shapes) == helpers.types(found)
    assert {x.dtype.name for x in jax.tree.leaves(found)} == {"float32"}
    exact = jax.tree.map(lambda p, g: p.astype(jnp.float32) - g, mixed(), grads)
    helpers.assert_close(found, exact, atol=0, rtol=2.0**-16)


def test_master_weights_of_a_part_are_that_part():
    tx, params = split_master(), {"w": jnp.ones((6, 4), BF16)}
    params, state = compiled("split_master")[1](
        params, tx.init(params), noise(0, params)
    )
    part = lambda tree: jax.tree.map(lambda x: x[2:3], tree)
    chex.assert_trees_all_equal(
        master_weights(part(state), part(params)), part(master_weights(state, params))
    )


@both
def test_float32_weights_are_split_and_joined_again(bits):
    tx, weights = by_roles(bits), mixed(jnp.float32)
    weights = jax.tree.map(lambda x: x + 0.1, noise(0, weights, size=0.7))
    like = jax.tree.map(lambda x, y: x.astype(y.dtype), weights, mixed())
    params, state = split_weights(tx.init(like), weights)
    chex.assert_trees_all_equal(params, like)  # nearest
    again = master_weights(state, params)
    exact = {8: 2.0**-16, 16: 0}[bits]
    helpers.assert_close(again, weights, atol=0, rtol=exact)
    updates, _ = tx.update(noise(1, params), state, params)
    assert updates["a"].dtype == jnp.float32


def twice():
    return optax.chain(split_master(), split_master(16))


def test_a_state_without_or_with_two_masters_is_refused_with_the_leaves():
    params = mixed()
    for state in (optax.adam(0.1).init(params), {"low_bits": params}):
        with pytest.raises(ValueError, match=r"no `SplitMasterState`(.|\n)*restore"):
            master_weights(state, params)
    state = twice().init(params)
    both = r"\['a'\]: 2 `split_master`(.|\n)*\['nested'\]\['b'\]: 2 `split_master`"
    with pytest.raises(ValueError, match=both):
        master_weights(state, params)


def test_low_bits_of_other_parameters_are_refused_with_the_leaves():
    state = split_master().init(mixed())
    other = mixed() | {"a": jnp.ones((6, 4), BF16), "nested": None}
    message = r"\['a'\]: .*\(4, 6\).*\(6, 4\)(.|\n)*\['b'\]: there is no such parameter"
    with pytest.raises(ValueError, match=message):
        master_weights(state, other)
    with pytest.raises(ValueError, match=r"\['a'\]: the parameter is float32"):
        master_weights(state, mixed(jnp.float32))


# Refusals


@every
@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_other_short_floats_are_refused_with_their_paths(name, dtype):
    tx, good = LINKS[name](), mixed()
    params = good | {"a": good["a"].astype(dtype), "c": jnp.ones(3, dtype)}
    message = rf"\['a'\] is {dtype}\n.*\['c'\] is {dtype}\n.*bfloat16"
    with pytest.raises(TypeError, match=message):
        tx.init(params)
    with pytest.raises(TypeError, match=message):
        tx.update(params, tx.init(good), params)


@every
def test_an_update_without_parameters_or_with_a_foreign_state_is_refused(name):
    tx, params = LINKS[name](), mixed()
    who = name.partition("(")[0]
    with pytest.raises(ValueError, match=f"`{who}` requires .*`params`"):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match=f"`{who}` needs a `.*State`.*got a dict"):
        tx.update(params, {}, params)


@pytest.mark.parametrize("bits", [0, 4, 12, "8"])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"must be 8 or 16, got "):
        split_master(bits)


def test_a_state_of_parameters_in_other_types_is_refused_with_the_leaves():
    tx = split_master()
    for held, given_ in ((mixed(), mixed("float32")), (mixed("float32"), mixed())):
        message = r"\['a'\] is .*\n.*\['nested'\]\['b'\] is .*\n.*split_weights"
        with pytest.raises(ValueError, match=message):
            tx.update(given_, tx.init(held), given_)
    assert isinstance(tx.init(mixed()), SplitMasterState)


@pytest.mark.parametrize(
    ("rounding", "moved"), [("stochastic", True), ("split", True), ("nearest", False)]
)
def test_baselines_land_as_the_configuration_says(rounding, moved):
    """A step of 1e-4 is a twentieth of what rounding to nearest keeps of a 1."""
    config = nj.OptimizerConfig(
        lr=1e-4, weight_rounding=rounding, schedule="cosine", total_steps=1000
    )
    params = {"kernel": jnp.ones((8, 16), jnp.bfloat16)}
    tx = optimizer.build_adamw(config, params)
    step = jax.jit(tx.update)
    state, weights = tx.init(params), params
    for _ in range(40):
        updates, state = step(params, state, weights)
        weights = optax.apply_updates(weights, updates)
    assert weights["kernel"].dtype == jnp.bfloat16
    assert bool((weights["kernel"] != 1).any()) == moved
