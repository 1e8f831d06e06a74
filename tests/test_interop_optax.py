"""Optax's wrappers see our variants as they see its own transforms.

`MultiSteps`, `partition`, `masked` and `map_params` are in `test_citizens`.
"""

import pickle

import chex
import jax
import jax.numpy as jnp
import optax
import optax.contrib

import helpers
import network

every = network.every


def gradients(step):
    return jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(step), x.shape), network.init()
    )


def direct(name, steps):
    """The updates of each step of the bare transform, and its state after the last."""
    tx, update = network.compiled(name)
    state, results = tx.init(network.init()), []
    for step in range(steps):
        updates, state = update(gradients(step), state, network.init())
        results.append(updates)
    return results, state


@every
def test_apply_if_finite_skips_a_step_as_if_it_had_not_been(name):
    tx, _ = network.compiled(name)
    params = network.init()
    guarded = optax.apply_if_finite(tx, max_consecutive_errors=2)
    update, state = jax.jit(guarded.update), guarded.init(params)
    nan = optax.tree.full_like(params, jnp.nan)
    _, state = update(gradients(0), state, params)
    skipped, state = update(nan, state, params)
    updates, state = update(gradients(1), state, params)
    expected, inner = direct(name, 2)
    chex.assert_trees_all_equal(skipped, optax.tree.zeros_like(params))
    helpers.assert_close(updates, expected[-1], atol=1e-4)
    assert helpers.types(state.inner_state) == helpers.types(inner)
    assert state.total_notfinite == 1


@every
def test_schedule_free_moves_its_iterate_by_our_updates(name):
    """`z` takes the updates; what is evaluated is the mean of all `z`."""
    tx, update = network.compiled(name)
    free = optax.contrib.schedule_free(tx, learning_rate=0.1, b1=0.9)
    z = params = network.init()
    state, inner, visited = free.init(params), tx.init(params), []
    step = jax.jit(free.update)
    for i in range(network.STEPS):
        updates, inner = update(gradients(i), inner, params)
        z = optax.apply_updates(z, updates)
        visited.append(z)
        updates, state = step(gradients(i), state, params)
        params = optax.apply_updates(params, updates)
    helpers.assert_close(state.z, z, atol=1e-3)
    mean = jax.tree.map(lambda *z: sum(z) / len(z), *visited)
    found = optax.contrib.schedule_free_eval_params(state, params)
    helpers.assert_close(found, mean, atol=1e-3)


@every
def test_an_injected_factor_and_a_plateau_scale_our_updates(name):
    """One compilation serves all values of both."""
    tx, _ = network.compiled(name)
    scaled = lambda factor: optax.chain(tx, optax.scale(factor))
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, cooldown=9)
    outer = optax.chain(optax.inject_hyperparams(scaled)(factor=1.0), plateau)
    params = network.init()
    state, update = outer.init(params), jax.jit(outer.update)
    expected, _ = direct(name, network.STEPS)
    for i, (factor, times) in enumerate([(1.0, 1.0), (3.0, 0.5), (2.0, 0.5)]):
        state[0].hyperparams["factor"] = jnp.asarray(factor)
        updates, state = update(gradients(i), state, params, value=jnp.asarray(1.0))
        wanted = optax.tree.scale(factor * times, expected[i])
        helpers.assert_close(updates, wanted, atol=1e-3)
    assert update._cache_size() == 1


@every
def test_lookahead_takes_half_of_two_of_our_steps(name):
    tx, update = network.compiled(name)
    ahead = optax.lookahead(tx, sync_period=2, slow_step_size=0.5)
    start = fast = network.init()
    params = optax.LookaheadParams.init_synced(start)
    state, step, inner = ahead.init(params), jax.jit(ahead.update), tx.init(start)
    for i in range(2):
        updates, inner = update(gradients(i), inner, fast)
        fast = optax.apply_updates(fast, updates)
        updates, state = step(gradients(i), state, params)
        params = optax.apply_updates(params, updates)
    half = jax.tree.map(lambda a, b: (a + b) / 2, start, fast)
    helpers.assert_close(params.slow, half, atol=1e-3)
    helpers.assert_close(params.fast, half, atol=1e-3)


@every
def test_a_state_is_a_tree_of_arrays_that_can_be_pickled(name):
    _, update = network.compiled(name)
    params, (_, state) = network.init(), direct(name, 1)
    leaves, treedef = jax.tree.flatten(state)
    assert all(isinstance(x, jax.Array) for x in leaves)
    copied = pickle.loads(pickle.dumps((leaves, treedef.unflatten(leaves))))
    assert jax.tree.structure(copied[1]) == treedef
    following = [update(gradients(1), s, params) for s in (state, copied[1])]
    chex.assert_trees_all_equal(*following)
