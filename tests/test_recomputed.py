"""Products keep what their factors are made of, and have the gradients all the same."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import helpers
from nanochat_jax.lm.model import block, gpt, next_token_loss, unstack_layers
from nanochat_jax.lm.model.recomputed import Recomputed, multiply
from tiny import MODEL

BATCH, LENGTH, SIZE = 2, 6, 16


def numbers(*shape, dtype=jnp.float32):
    draw = np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)
    return jnp.asarray(draw, dtype)


def gated(gate, up):
    return jax.nn.silu(gate) * up


def scaled(tree, x):
    return jnp.tanh(x) * tree["scale"][None, None] + tree["shift"][0][None, None]


FACTORS = {
    "one array": (jnp.sin, (numbers(BATCH, LENGTH, SIZE),)),
    "two arrays": (gated, (numbers(BATCH, LENGTH, SIZE), numbers(2, 6, SIZE) + 1)),
    "a tree": (
        scaled,
        (
            {"scale": numbers(SIZE), "shift": [numbers(SIZE + 1)[1:]]},
            numbers(BATCH, LENGTH, SIZE),
        ),
    ),
}


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_those_of_the_plain_products(name, dtype):
    of, inputs = FACTORS[name]
    kernels = [numbers(SIZE, out, dtype=dtype) for out in (8, 24)]
    given = numbers(BATCH, LENGTH, 8), numbers(BATCH, LENGTH, 24)

    def products(inputs, kernels):
        return multiply(Recomputed(of, inputs), kernels)

    def plain(inputs, kernels):
        x = of(*inputs).astype(dtype)
        return [x @ kernel for kernel in kernels]

    def both(f):
        results, pull = jax.vjp(f, inputs, kernels)
        return results, pull([g.astype(dtype) for g in given])

    found, expected = (jax.jit(functools.partial(both, f))() for f in (products, plain))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_close(
        *(jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in (found, expected)),
        **({"atol": 1e-5} if dtype == jnp.float32 else {"atol": 0.1, "rtol": 0.03}),
    )


def test_a_factor_of_a_factor_is_made_of_the_same_inputs():
    x = Recomputed(jnp.add, (jnp.float32(1), jnp.arange(3.0)))
    then = x.then(jnp.square).then(jnp.negative)
    assert then.inputs is x.inputs
    np.testing.assert_array_equal(then.value, [-1, -4, -9])


def test_norms_are_those_of_flax():
    for dtype, use_scale in itertools.product(("float32", "bfloat16"), (True, False)):
        config = dataclasses.replace(MODEL, compute_dtype=dtype)
        layer = block.norm(config, SIZE, nnx.Rngs(0), use_scale=use_scale)
        if use_scale:
            layer.scale[...] = numbers(SIZE)
        x = 3 * numbers(BATCH, LENGTH, SIZE)
        found, expected = jax.jit(lambda x, n=layer: (block._normed(n, x).value, n(x)))(
            x
        )
        chex.assert_trees_all_equal(found, expected)


def test_second_derivatives_of_stacked_layers_are_those_of_separate_ones():
    """JAX may confuse what a scan keeps for them."""
    config = dataclasses.replace(MODEL, dim=16, n_heads=2, n_kv_heads=1)
    graphdef, params = gpt.init(dataclasses.replace(config, scan_layers=True), 0)
    separate, batch = gpt.abstract_model(config)[0], jnp.arange(18).reshape(2, 9)

    def squares(graphdef, params):
        grads = jax.grad(functools.partial(next_token_loss, graphdef))(params, batch)
        return sum(jnp.vdot(x, x) for x in jax.tree.leaves(grads))

    found = jax.jit(jax.grad(functools.partial(squares, graphdef)))(params)
    expected = jax.jit(jax.grad(functools.partial(squares, separate)))(
        unstack_layers(params)
    )
    found = unstack_layers(found)
    chex.assert_trees_all_close(found, expected, atol=1e-3, rtol=1e-3)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected)) > 0.1


def temporaries(f, *args):
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


@helpers.on_processors
def test_a_layer_keeps_products_and_weights_of_keys_alone():
    """Per layer: both residual streams, three heads, their mean, and gate and up."""
    tokens, dim, hidden = 512, 64, 192
    of = lambda layers: dataclasses.replace(
        MODEL, dim=dim, ffn_mult=hidden / dim, n_heads=4, n_kv_heads=4,
        n_layers=layers, max_seq_len=256,
    )  # fmt: skip

    def held(layers):
        graphdef, params = gpt.abstract_model(of(layers))
        batch = jax.ShapeDtypeStruct((2, tokens // 2 + 1), jnp.int32)
        loss = functools.partial(next_token_loss, graphdef)
        return temporaries(jax.grad(loss), params, batch)

    weights = 4 * (64 + 128 + 192 + 256) / 4
    kept = 4 * tokens * (6 * dim + 2 * hidden + weights)
    layer = (held(6) - held(2)) / 4
    assert 0.9 * kept < layer < 1.1 * kept
