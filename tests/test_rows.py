"""A few rows at a time: the same update, with the temporaries of those rows."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import helpers
import nanochat_jax as nj
from nanochat_jax.optimizer.memory import compiled_bytes

SCALES = {"scale_dtype": "bfloat16"}
ADAM = {
    "mu": nj.Int8(16, **SCALES),
    "nu": nj.Dynamic8(16, signed=False, zero=False, **SCALES),
}
TRANSFORMS = {
    "adamw": lambda: optax.adamw(optax.linear_schedule(0.1, 0.0, 4), weight_decay=0.1),
    "stored adamw": lambda: helpers.quantized(optax.adamw(0.1, weight_decay=0.1), ADAM),
    "stored lion": lambda: helpers.quantized(
        optax.lion(0.1), {"mu": nj.Dynamic8(16, **SCALES)}
    ),
    "4 bits": lambda: helpers.quantized(nj.momentum(), {"momentum": nj.Int4(16)}),
}
SHAPES = {"table": (37, 24), "stack": (5, 6, 24), "row": (24,)}


def tree(step, dtype=jnp.float32):
    return {
        name: jax.random.normal(jax.random.key(step), shape, dtype)
        for name, shape in SHAPES.items()
    }


def run(tx, params, grads):
    state, update, all_updates = tx.init(params), jax.jit(tx.update), []
    for g in grads:
        updates, state = update(g, state, params)
        all_updates.append(updates)
    return all_updates, state


@pytest.mark.parametrize(
    ("name", "max_bytes"),
    # Ten rows of the table and seven left; one row.
    [*((name, 1000) for name in TRANSFORMS), ("4 bits", 1)],
)
def test_by_rows_and_whole_give_the_same(name, max_bytes):
    inner = TRANSFORMS[name]()
    tx = nj.sequence(inner, max_bytes=max_bytes, core_ndim=1)
    grads = [tree(step) for step in range(3)]
    updates, state = run(tx, tree(9), grads)
    expected, reference = run(inner, tree(9), grads)
    helpers.assert_close(updates, expected, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, reference)
    counts = lambda state: [x for x in jax.tree.leaves(state) if x.ndim == 0]
    assert counts(state) == counts(reference)  # once a step, not once a row


def test_short_floats_keep_their_type():
    tx = nj.sequence(TRANSFORMS["stored adamw"](), max_bytes=1000, core_ndim=1)
    params = tree(0, jnp.bfloat16)
    [updates], state = run(tx, params, [tree(1, jnp.bfloat16)])
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))


def stacked_muon():
    inner = optax.chain(
        nj.momentum(), nj.orthogonalize(dtype="float32"), nj.scale_by_shape()
    )
    return helpers.quantized(inner, {"momentum": nj.Int8(16)})


def test_the_matrices_of_a_stack_are_worked_on_one_by_one_and_others_whole():
    shapes = {"stack": (5, 6, 24), "matrix": (37, 24)}
    draw = lambda step: {
        name: jax.random.normal(jax.random.key(step), shape)
        for name, shape in shapes.items()
    }
    grads = [draw(step) for step in range(2)]
    tx = nj.sequence(stacked_muon(), max_bytes=1, core_ndim=2)
    updates, state = run(tx, draw(9), grads)
    expected, reference = run(stacked_muon(), draw(9), grads)
    helpers.assert_close(updates, expected, atol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, reference)


def test_updates_that_change_their_type_are_worked_on_whole():
    """As those that land on bfloat16 weights do, which are float32."""
    inner = optax.chain(nj.momentum(), nj.round_updates())
    params, grads = tree(0, jnp.bfloat16), tree(1, jnp.bfloat16)
    expected = inner.update(grads, inner.init(params), params)[0]
    assert {x.dtype for x in jax.tree.leaves(expected)} == {jnp.dtype("float32")}
    tx = nj.sequence(inner, max_bytes=1, core_ndim=2)
    updates = jax.jit(tx.update)(grads, tx.init(params), params)[0]
    helpers.assert_close(updates, expected)


def test_a_bare_array_is_worked_on_by_rows_too():
    inner = TRANSFORMS["stored adamw"]()
    tx = nj.sequence(inner, max_bytes=1000, core_ndim=1)
    [updates], _ = run(tx, tree(0)["table"], [tree(1)["table"]])
    [expected], _ = run(inner, tree(0)["table"], [tree(1)["table"]])
    helpers.assert_close(updates, expected, atol=1e-6)


@helpers.on_processors
@pytest.mark.parametrize("clip", [False, True])
def test_temporaries_are_those_of_the_rows(clip):
    """The bound holds for any number of rows; without it they are several copies."""
    table = jax.ShapeDtypeStruct((20_000, 64), jnp.float32)
    inner, max_bytes = TRANSFORMS["stored adamw"](), 1 << 16
    by_rows = nj.sequence(inner, max_bytes=max_bytes, core_ndim=1)
    if clip:  # a gradient that is scaled first is not kept beside the updates
        by_rows = optax.chain(optax.clip_by_global_norm(1.0), by_rows)
    assert compiled_bytes(by_rows, table)["temp_bytes"] <= 12 * max_bytes
    assert compiled_bytes(inner, table)["temp_bytes"] > 4 * table.size
