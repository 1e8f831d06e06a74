"""The transforms under test, and a small tree of parameters for every branch."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nanochat_jax as nj
from nanochat_jax.codecs import BFloat16
from nanochat_jax.transforms import (
    PowerStep,
    average_weights,
    decay_weights,
    fix_norms,
    floor_updates,
    normalize_rows,
    owned,
    precision,
    precondition,
    round_updates,
    split_master,
)

INT8 = {"momentum": nj.Int8(16)}
BOTH = {"momentum": nj.Int8(16), "basis": nj.Int4(16)}


def muon():
    return optax.chain(nj.momentum(), nj.orthogonalize(dtype="float32"))


def low_rank(inner, **kwargs):
    """GaLore as the tests use it: a rank below every short side, two refreshes soon."""
    rule = nj.RandomizedSVD(2, power_iterations=2)
    return nj.galore(inner, 5, basis=rule, **kwargs)


def joint():
    return optax.chain(
        low_rank(nj.momentum(), complement=1.0), nj.orthogonalize(dtype="float32")
    )


def two_speed():
    inner = low_rank(nj.momentum(), complement=nj.momentum(0.7))
    return optax.chain(inner, nj.orthogonalize(dtype="float32"))


def quantized(inner, codecs):
    return nj.quantize_state(inner, codecs, min_size=1)


def built(tree=None, **kwargs):
    config = nj.OptimizerConfig(**kwargs, galore_rank=5, galore_update_freq=2)
    last_two = lambda path, shape: nj.MatrixAxes(fan_in=-2, fan_out=-1)
    tree = params() if tree is None else tree
    return nj.build_optimizer(config, tree, matrix_axes=last_two)


def preconditioned(inner, **kwargs):
    return precondition(inner, basis=PowerStep(2), **kwargs)


SOAP = {
    "momentum": nj.Int8(16),
    "gram_short": nj.Int8(16),
    "basis_short": BFloat16(),
    "second_moment": nj.Dynamic8(16, signed=False, zero=False),
}
STOCHASTIC = {"momentum": nj.Int8(16, stochastic_rounding=True)}

TRANSFORMS = {
    "momentum": nj.momentum,
    "orthogonalize": nj.orthogonalize,
    "scale_by_shape": nj.scale_by_shape,
    "normuon": lambda: optax.chain(muon(), normalize_rows(beta=0.9)),
    "muon_eq": lambda: optax.chain(normalize_rows("both"), muon()),
    "int8(momentum)": lambda: quantized(nj.momentum(), INT8),
    "stochastic int8(muon)": lambda: quantized(muon(), STOCHASTIC),
    "int8(adam.mu)": lambda: quantized(optax.scale_by_adam(), {"mu": nj.Int8()}),
    "galore(muon)": lambda: low_rank(muon()),
    "galore(adam)": lambda: low_rank(optax.scale_by_adam()),
    "galore(int8(momentum))": lambda: low_rank(
        quantized(nj.momentum(), INT8), reproject=()
    ),
    "int8(galore(muon))": lambda: quantized(low_rank(muon()), BOTH),
    "owned(int8(joint))": lambda: owned(quantized(joint(), BOTH)),
    "int8(joint)": lambda: quantized(joint(), BOTH),
    "int8, 2 bits(two speeds)": lambda: quantized(
        two_speed(), BOTH | {"complement": nj.Normal2(16)}
    ),
    "as_matrices(int8(joint))": lambda: nj.as_matrices(
        quantized(joint(), BOTH), lambda path, shape: nj.MatrixAxes(-1, -2)
    ),
    "sequence(int8(joint))": lambda: nj.sequence(quantized(joint(), BOTH), max_bytes=1),
    "round_updates(momentum)": lambda: optax.chain(nj.momentum(), round_updates()),
    "split_master(momentum)": lambda: optax.chain(nj.momentum(), split_master()),
    "precondition": lambda: preconditioned(nj.momentum(), sides="both"),
    "few bits(soap muon)": lambda: quantized(
        optax.chain(preconditioned(nj.momentum()), nj.orthogonalize(dtype="float32")),
        SOAP,
    ),
    "galore(precondition)": lambda: low_rank(preconditioned(nj.momentum())),
    "cautious decay": lambda: optax.chain(
        nj.momentum(),
        decay_weights(
            lambda count: 0.1 * jnp.exp(-count.astype(jnp.float32)), cautious=True
        ),
    ),
    "floors, fixed norms": lambda: optax.chain(
        floor_updates(0.4), floor_updates(0.5, by="neuron"), optax.sgd(0.1), fix_norms()
    ),
    "int8(average)": lambda: quantized(
        average_weights(1, 2), {"average": nj.Int8(16, stochastic_rounding=True)}
    ),
    "built, both flags": lambda: built(use_8bit_optim=True, use_galore=True),
}


class Named(NamedTuple):
    """Parameters with the names of fields of states."""

    momentum: Any
    nu: Any


def params(dtype=jnp.float32):
    """A tall matrix, wide ones stacked, a small one, and the `None` Equinox leaves.

    Some are nested, under names that others have too.
    """
    shapes = {"tall": (40, 8), "stack": (2, 8, 24), "small": (2, 3)}
    shapes["nested"] = Named({"tall": (40, 8)}, (2, 3))
    flat, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: type(x) is tuple)
    leaves = [
        jax.random.normal(jax.random.key(i), shape, dtype)
        for i, shape in enumerate(flat)
    ]
    return treedef.unflatten(leaves) | {"absent": None}


def gradients(step, dtype=jnp.float32):
    return jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(100 + step), x.shape, dtype),
        params(dtype),
    )


def make(name, tree):
    """The transform of that name, for a tree of other parameters."""
    if name.startswith("built"):
        return built(tree, use_8bit_optim=True, use_galore=True)
    return optax.with_extra_args_support(TRANSFORMS[name]())


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype.name), tree)


def like_updates(name, params):
    """Shapes and types of updates for parameters: these, but float32 of a last link."""
    is_last = name.startswith(("round_updates", "split_master"))
    return jax.eval_shape(precision.widened, params) if is_last else params


@functools.cache
def compiled(name):
    """The transform of that name and its jitted update, compiled once a process.

    The state it is given is donated, and so not to be used again.
    """
    tx = optax.with_extra_args_support(TRANSFORMS[name]())
    return tx, jax.jit(tx.update, donate_argnums=1)


def run(name, steps):
    """Runs a transform for some steps; returns the last updates and the state."""
    tx, update = compiled(name)
    state, updates = tx.init(params()), None
    for step in range(steps):
        updates, state = update(gradients(step), state, params())
    return updates, state


def matrix_with_spectrum(shape, spectrum, seed=0):
    """A matrix with the given singular values and random singular vectors."""
    rng = np.random.default_rng(seed)
    k = len(spectrum)
    u = np.linalg.qr(rng.normal(size=(shape[0], k)))[0]
    v = np.linalg.qr(rng.normal(size=(shape[1], k)))[0]
    return jnp.asarray((u * spectrum) @ v.T, jnp.float32)


on_processors = pytest.mark.skipif(
    jax.default_backend() != "cpu",
    reason="holds for processors: GPUs plan 32 MiB more, and round otherwise",
)


def assert_close(a, b, atol=1e-5, rtol=1e-5):
    chex.assert_trees_all_close(a, b, atol=atol, rtol=rtol)


def count_product_flops(function, *args):
    """Counts the operations of all matrix products in a function, loops unrolled."""

    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                inner = np.prod([eqn.invars[0].aval.shape[d] for d in contracted])
                total += 2 * inner * np.prod(eqn.outvars[0].aval.shape)
            if "jaxpr" in eqn.params:
                inside = count(
                    getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
                )
                total += inside * eqn.params.get("length", 1)
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr)
