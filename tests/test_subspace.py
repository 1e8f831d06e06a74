"""Accumulating gradients in the low-rank space is accumulating them whole."""

import jax
import jax.numpy as jnp
import optax
import pytest

import helpers
import nanochat_jax as nj

SHAPES = {"wide": (16, 48), "tall": (2, 48, 16), "square": (4, 4), "bias": (48,)}
PARAMS = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
OPTIMIZERS = {
    "galore": lambda: nj.galore(nj.momentum(), rank=4, basis=nj.RandomizedSVD(3)),
    "quantised, in a partition": lambda: nj.build_optimizer(
        nj.OptimizerConfig(
            use_8bit_optim=True,
            use_galore=True,
            galore_rank=4,
            galore_update_freq=3,
            galore_residual=0.0,
            quant_min_size=0,
            ns_dtype="float32",
            grad_clip=0.0,
        ),
        PARAMS,
        matrix_axes={"tall": nj.MatrixAxes(-2, -1)}
        | dict.fromkeys(SHAPES.keys() - {"tall"}),
    ),
}


def microbatches(step):
    keys = jax.random.split(jax.random.key(step), 3)
    draw = lambda key: {
        name: jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    return [draw(key) for key in keys]


def mean(trees):
    return jax.tree.map(lambda *xs: sum(xs) / len(xs), *trees)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_projecting_first_gives_the_update_of_the_whole_gradient(name):
    tx = OPTIMIZERS[name]()
    whole = jax.jit(tx.update)
    projected = jax.jit(
        lambda batches, state: tx.update(
            mean([nj.project_gradients(state, g) for g in batches]),
            state,
            PARAMS,
            projected=True,
        )
    )
    state = tx.init(PARAMS)
    for step in range(6):
        batches = microbatches(step)
        expected, after = whole(mean(batches), state, PARAMS)
        if step % 3:
            updates, low = projected(batches, state)
            helpers.assert_close(updates, expected, atol=2e-5)
            assert jax.tree.structure(low) == jax.tree.structure(after)
        state = after


def test_only_projected_leaves_change_their_shape():
    tx = OPTIMIZERS["galore"]()
    low = nj.project_gradients(tx.init(PARAMS), PARAMS)
    shapes = jax.tree.map(jnp.shape, low)
    assert shapes == SHAPES | {"wide": (4, 48), "tall": (2, 4, 48)} | {
        "square": shapes["square"]
    }
    assert shapes["square"] == (4, 4)


@pytest.mark.parametrize(
    ("kwargs", "params"),
    [
        ({"complement": 1.0}, PARAMS),
        ({"complement": nj.momentum()}, PARAMS),
        ({}, None),
    ],
)
def test_what_needs_the_whole_gradient_refuses_projected_ones(kwargs, params):
    tx = nj.galore(optax.identity(), rank=4, **kwargs)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="whole gradients"):
        tx.update(PARAMS, state, params, projected=True)
