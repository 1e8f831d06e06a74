"""One small network under each variant, trained with nothing but Optax.

Whatever holds the parameters, Flax, Equinox or a wrapper of Optax, has to arrive where
`trained` does.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import helpers
import nanochat_jax as nj

STEPS = 3
TOKENS = jnp.arange(16)
FLAGS = {
    "muon": {},
    "muon_8bit": {"use_8bit_optim": True},
    "galore": {"use_galore": True},
    "galore_8bit": {"use_8bit_optim": True, "use_galore": True},
}
ALIKE = {"muon_8bit", "galore"}  # of which "galore_8bit" is made
every = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE))
        for name in [*FLAGS, "by hand"]
    ],
)


def init():
    """Embedding, a layer with a bias and one without, as Flax names and lays them."""
    normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape) / 8**0.5
    return {
        "embed": {"embedding": normal(0, 16, 8)},
        "up": {"kernel": normal(1, 8, 24), "bias": jnp.zeros(24)},
        "down": {"kernel": normal(2, 24, 8)},
    }


def loss(params):
    """Distance of the network's outputs from one."""
    x = params["embed"]["embedding"][TOKENS]
    x = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return jnp.mean((x @ params["down"]["kernel"] - 1) ** 2)


def optimizer(name, params):
    if name == "by hand":
        low_rank = nj.galore(
            nj.momentum(), 5, basis=nj.RandomizedSVD(2), complement=1.0
        )
        direction = optax.chain(low_rank, nj.orthogonalize(dtype="float32"))
        muon = optax.chain(
            helpers.quantized(direction, helpers.BOTH),
            nj.scale_by_shape("rms"),
            optax.scale_by_learning_rate(0.1),
        )
        others = dict.fromkeys(("embedding", "head", "vector"), optax.adam(0.1))
        return optax.partition({"matrix": muon, **others}, nj.label_params)
    config = nj.OptimizerConfig(
        **FLAGS[name],
        lr=0.1,
        fallback_lr=0.1,
        weight_decay=0.1,
        ns_steps=2,
        galore_rank=5,
        galore_update_freq=2,
        quant_min_size=0,
        quant_block_size=8,
    )
    return nj.build_optimizer(config, params)


@functools.cache
def compiled(name):
    """The transform of that name and its jitted update, compiled once a process."""
    tx = optimizer(name, init())
    return tx, jax.jit(tx.update)


@functools.cache
def trained(name):
    """Parameters after `STEPS` steps."""
    return train(*compiled(name), init(), loss)


def train(tx, update, params, loss):
    """Trains a tree of parameters by Optax alone."""
    state, grad = tx.init(params), jax.jit(jax.grad(loss))
    for _ in range(STEPS):
        updates, state = update(grad(params), state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_trained(params, wanted, start):
    """Asserts that parameters are where they should be, for the way they have come.

    Programs that are compiled apart round apart, and where a code or a basis hangs on a
    last digit, by a hundredth of the way. A state lost on it shows as a quarter.
    """
    for p, w, s in zip(*map(jax.tree.leaves, (params, wanted, start)), strict=True):
        assert jnp.linalg.norm(p - w) <= 0.05 * jnp.linalg.norm(w - s)
