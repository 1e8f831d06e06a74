"""Equinox blocks in bfloat16, updated in the backward pass.

Run it with `python examples/backward_equinox.py`; it takes a few seconds. A stack of
blocks learns to sort eight numbers. Weights are bfloat16, with 8 further bits of each
as state of `split_master`, the last link of the optimizer: so no small update is lost.
Each step takes two microbatches, whose gradients are added up a layer at a time.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import nanochat_jax as nj

LAYERS, WIDTH, NUMBERS, STEPS = 6, 64, 8, 150


class Block(eqx.Module):
    norm: eqx.nn.RMSNorm
    mlp: eqx.nn.MLP

    def __init__(self, key: jax.Array) -> None:
        self.norm = eqx.nn.RMSNorm(WIDTH)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, depth=1, key=key)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.mlp(self.norm(x))


def embed(rest: dict, numbers: jax.Array) -> jax.Array:
    return numbers.astype(jnp.bfloat16) @ rest["first"]


def head(rest: dict, x: jax.Array, numbers: jax.Array) -> jax.Array:
    found = (x @ rest["last"]).astype(jnp.float32)
    return jnp.mean((found - jnp.sort(numbers)) ** 2)


def main() -> dict[str, float]:
    keys = jax.random.split(jax.random.key(0), LAYERS)
    stack = eqx.filter_vmap(Block)(keys)  # every array `[LAYERS, ...]`
    arrays, static = eqx.partition(stack, eqx.is_inexact_array)
    draw = lambda seed, shape: jax.random.normal(jax.random.key(seed), shape)
    params = {"blocks": arrays, "first": draw(1, (NUMBERS, WIDTH)) / 3}
    params |= {"last": draw(2, (WIDTH, NUMBERS)) / WIDTH}
    params = optax.tree.cast(params, jnp.bfloat16)

    def block(layer: Block, x: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(layer, static))(x)

    rate = optax.linear_schedule(0.003, 0.0, STEPS)
    tx = optax.chain(optax.adamw(rate), nj.split_master())
    init, step = nj.update_in_backward(embed, block, head, tx, microbatches=True)
    state, step, losses = init(params), jax.jit(step, donate_argnums=(0, 1)), []
    for key in jax.random.split(jax.random.key(3), STEPS):
        numbers = jax.random.normal(key, (2, 128, NUMBERS))
        params, state, report = step(params, state, numbers)
        losses.append(float(report.loss))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.2g} in {STEPS} steps")
    whole = nj.master_weights(state, params)  # float32
    return {"first_loss": losses[0], "last_loss": losses[-1], "weights": whole}


if __name__ == "__main__":
    main()
