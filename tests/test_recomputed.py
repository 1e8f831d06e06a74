"""Products keep what their factors are made of, and have the gradients all the same."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from nanochat_jax.lm.model import gpt, next_token_loss
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
