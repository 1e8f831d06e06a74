#!/usr/bin/env bash
# Second derivatives through a scan of a custom_vjp are wrong, without an error, if its backward pass
# differentiates a function that holds a constant array made by jnp.
#
# One would expect the same numbers from a scan as from a Python loop over the layers, or an error.
# The first derivative is right. For the second, JAX takes constants of the loop out of it and then
# pairs what is left with the wrong arguments of the backward pass: if two of them have one shape,
# the derivatives are off by more than their size, and otherwise the trace ends with an error about
# shapes. A NumPy array in place of the jnp.full is harmless, and
# so is the same function without a scan. A constant need not be seen: Flax's nnx.RMSNorm subtracts
# a mean of zeros.
#
# Seen with jax and jaxlib 0.10.2, and with jax 0.12.0.1: an error of 1.1 times the norm, where all else is
# right to 2e-7.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 2>/dev/null
JAX_PLATFORMS=cpu "$folder/bin/python" - <<'PY'
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

SIZE, LAYERS = 8, 3


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(of, x, kernel):
    """`of(x) @ kernel`, whose backward pass works `of(x)` out again."""
    return of(x) @ kernel


def forward(of, x, kernel):
    return product(of, x, kernel), (x, kernel)


def backward(of, kept, g):
    x, kernel = kept
    y, pull = jax.vjp(of, x)
    return pull(g @ kernel.T)[0], y.T @ g


product.defvjp(forward, backward)


def layer(of, x, kernels):
    up, down = kernels
    return x + product(jnp.tanh, product(of, x, up), down)


def in_scan(of, kernels, x):
    step = lambda x, kernels: (layer(of, x, kernels), None)
    return jnp.sum(jax.lax.scan(step, x, kernels)[0] ** 2)


def in_loop(of, kernels, x):
    for i in range(LAYERS):
        x = layer(of, x, [kernel[i] for kernel in kernels])
    return jnp.sum(x**2)


def derivatives(loss, of, order):
    f = lambda kernels: loss(of, kernels, x)
    for _ in range(order - 1):
        squares = lambda kernels, f=f: sum(jnp.vdot(g, g) for g in jax.grad(f)(kernels))
        f = squares
    return jax.jit(jax.grad(f))(kernels)


x, *kernels = (
    0.3 * jax.random.normal(jax.random.key(i), shape)
    for i, shape in enumerate([(SIZE, SIZE)] + 2 * [(LAYERS, SIZE, SIZE)])
)
TWOS = np.full((SIZE, SIZE), 2, np.float32)
functions = {
    "without a constant": lambda x: jnp.sin(x),
    "a constant of NumPy": lambda x: jnp.sin(x) * TWOS,
    "a constant of jnp": lambda x: jnp.sin(x) * jnp.full(x.shape, 2.0),
}
errors = {}
for name, of in functions.items():
    for order in (1, 2):
        found, expected = (derivatives(loss, of, order) for loss in (in_scan, in_loop))
        errors[name, order] = max(
            float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
            for a, b in zip(found, expected, strict=True)
        )
        print(f"{name}, derivative {order}: scan and loop differ by {errors[name, order]:.1e}")
wrong = errors.pop(("a constant of jnp", 2))
assert wrong > 0.1, wrong
assert max(errors.values()) < 1e-4, errors
PY
