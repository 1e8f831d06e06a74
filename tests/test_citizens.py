"""Every transform, and every nesting of them, is a good citizen of Optax."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from orbax.checkpoint import v1 as ocp

import helpers
import nanochat_jax as nj

every = pytest.mark.parametrize("name", helpers.TRANSFORMS)

# Each of these is made of parts that the others have too.
ALIKE = {
    "stochastic int8(muon)", "galore(adam)", "galore(int8(momentum))",
    "int8(galore(muon))", "int8(joint)", "as_matrices(int8(joint))",
    "sequence(int8(joint))", "muon_eq", "precondition", "galore(precondition)",
}  # fmt: skip
wrapped = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE))
        for name in helpers.TRANSFORMS
    ],
)
"""For what wraps a transform, and so compiles it once more."""


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_keep_types_and_state_keeps_its_own(name, dtype):
    tx = helpers.TRANSFORMS[name]()
    params = helpers.params(jnp.float32)
    state = tx.init(params)
    grads = helpers.gradients(0, dtype)
    updates, new_state = jax.eval_shape(tx.update, grads, state, params)
    assert helpers.types(updates) == helpers.types(grads)
    if dtype == "float32" or "adam" not in name:  # Optax's Adam takes the gradients'
        assert helpers.types(new_state) == helpers.types(state)


@every
def test_bfloat16_parameters_give_a_stable_state(name):
    tx = helpers.TRANSFORMS[name]()
    params = helpers.params(jnp.bfloat16)
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params)
    assert helpers.types(updates) == helpers.types(helpers.like_updates(name, params))
    assert helpers.types(new_state) == helpers.types(state)


@every
def test_init_is_abstract_and_holds_only_savable_arrays(name):
    tx = helpers.TRANSFORMS[name]()
    state = tx.init(helpers.params())
    assert helpers.types(jax.eval_shape(tx.init, helpers.params())) == helpers.types(
        state
    )
    for x in jax.tree.leaves(state):
        assert x.size > 0
        assert not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


@wrapped
def test_scan_accepts_extra_arguments_and_equals_a_loop(name):
    tx, _ = helpers.compiled(name)
    params = helpers.params()
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(helpers.gradients, range(3)))

    def body(state, grads):
        updates, state = tx.update(grads, state, params, loss=1.0)
        return state, updates

    state, updates = jax.lax.scan(body, tx.init(params), stacked)
    last, expected = helpers.run(name, 3)
    helpers.assert_close(jax.tree.map(lambda x: x[-1], updates), last, atol=1e-4)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)


@every
def test_compiles_once_and_is_deterministic(name):
    chex.assert_trees_all_equal(helpers.run(name, 3), helpers.run(name, 3))
    _, update = helpers.compiled(name)
    assert update._cache_size() == 1


@every
def test_donated_state_is_reused(name):
    tx, update = helpers.compiled(name)
    state = jax.eval_shape(tx.init, helpers.params())
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    args = helpers.gradients(0), tx.init(helpers.params()), helpers.params()
    compiled = update.lower(*args).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= held


@wrapped
def test_multi_steps_gives_the_update_of_the_mean_gradient(name):
    tx, update = helpers.compiled(name)
    params = helpers.params()
    multi = optax.MultiSteps(tx, 2)
    state, step = multi.init(params), jax.jit(multi.update)
    _, state = step(helpers.gradients(0), state, params)
    updates, _ = step(helpers.gradients(1), state, params)
    mean = jax.tree.map(
        lambda a, b: (a + b) / 2, helpers.gradients(0), helpers.gradients(1)
    )
    expected, _ = update(mean, tx.init(params), params)
    # Two sums of one gradient may differ in their last digits, and bases then in more.
    helpers.assert_close(updates, expected, atol=1e-3)


@every
def test_map_params_finds_every_copy_and_nothing_else(name):
    tx, _ = helpers.compiled(name)
    _, state = helpers.run(name, 1)
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    before, after = map(jax.tree.leaves_with_path, (state, mapped))
    kept = [path for (path, x), (_, y) in zip(before, after, strict=True) if x is y]
    assert all(path[-1] == jax.tree_util.GetAttrKey("count") for path in kept)
    copies = sum(path[-1] != jax.tree_util.GetAttrKey("count") for path, _ in before)
    assert len(before) - len(kept) == copies


@wrapped
def test_partition_and_masked_give_each_leaf_its_own_update(name):
    tx, update = helpers.compiled(name)
    params, grads = helpers.params(), helpers.gradients(0)
    label = lambda tree: {k: "rest" if k == "small" else "tx" for k in tree}
    parts = optax.partition({"tx": tx, "rest": optax.sgd(1.0)}, label)
    mask = {k: k != "small" for k in params}
    expected, _ = update(grads, tx.init(params), params)
    if name.startswith("built"):  # clips by the norm of all the leaves it sees
        pytest.skip("a global norm depends on which leaves are there")
    for split in (parts, optax.masked(tx, mask)):
        updates, _ = jax.jit(split.update)(grads, split.init(params), params)
        for leaf in ("tall", "stack"):
            helpers.assert_close(updates[leaf], expected[leaf], atol=1e-4)
        sign = -1 if split is parts else 1
        helpers.assert_close(updates["small"], sign * grads["small"])


@every
def test_round_trips_through_orbax(name, tmp_path):
    _, state = helpers.run(name, 1)
    if not jax.tree.leaves(state):
        pytest.skip("no state to save")
    ocp.save(tmp_path / "state", state)
    restored = ocp.load(tmp_path / "state", jax.tree.map(ocp_struct, state))
    chex.assert_trees_all_equal(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)


def ocp_struct(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def test_hyperparameters_can_be_injected():
    params, grads = helpers.params(), helpers.gradients(0)
    static = ("rank", "basis", "project", "reproject")
    tx = optax.inject_hyperparams(nj.galore, static_args=static)(
        helpers.muon(), rank=5, scale=lambda count: 0.5, complement=0.25
    )
    plain = nj.galore(helpers.muon(), rank=5, scale=0.5, complement=0.25)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    expected, _ = plain.update(grads, plain.init(params), params)
    helpers.assert_close(updates, expected, atol=1e-4)
    assert state.hyperparams["scale"] == 0.5


def test_hyperparameters_can_be_injected_inside_quantize_state():
    params, grads = helpers.params(), helpers.gradients(0)
    injected = optax.inject_hyperparams(nj.momentum)(beta=0.9)
    tx = helpers.quantized(injected, helpers.INT8)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    plain = nj.momentum(0.9)
    expected, _ = plain.update(grads, plain.init(params), params)
    helpers.assert_close(updates, expected)
    assert state.inner.hyperparams["beta"] == pytest.approx(0.9)
