"""A stack of Flax NNX blocks that is updated in the backward pass.

Run it with `python examples/backward_nnx.py`; it takes a few seconds. Eight residual
blocks learn a rotation by random angles. The step updates each block as soon as it has
its gradient, so that gradients of one block exist at a time. The blocks are under Muon
with momentum in 8 bits, the rest under Adam.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import nanochat_jax as nj

LAYERS, WIDTH, STEPS = 8, 64, 100


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


def embed(rest: dict, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    return batch[0] @ rest["first"]


def head(rest: dict, x: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    return jnp.mean((x @ rest["last"] - batch[1]) ** 2)


def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns points on a circle with angles, `[256, 3]`, and the points turned."""
    start, turn = jax.random.uniform(key, (2, 256), minval=-3, maxval=3)
    point = lambda angle: jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)
    return jnp.column_stack([point(start), turn]), point(start + turn)


def main() -> dict[str, float]:
    stack = nnx.vmap(Block)(nnx.Rngs(0).split(LAYERS))
    graphdef, blocks = nnx.split(stack)
    params = {
        "blocks": nnx.to_pure_dict(blocks),  # every leaf `[LAYERS, ...]`
        "first": jax.random.normal(jax.random.key(1), (3, WIDTH)),
        "last": jax.random.normal(jax.random.key(2), (WIDTH, 2)) / WIDTH,
    }
    block = lambda layer, x: nnx.merge(graphdef, layer)(x)
    rate = optax.linear_schedule(0.01, 0.0, STEPS)
    muon = nj.muon(rate, bits=8, min_size=1)
    init, step = nj.update_in_backward(embed, block, head, muon, optax.adam(rate))
    state, step, losses = init(params), jax.jit(step, donate_argnums=(0, 1)), []
    for key in jax.random.split(jax.random.key(3), STEPS):
        params, state, report = step(params, state, draw(key))
        losses.append(float(report.loss))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.2g} in {STEPS} steps")
    return {"first_loss": losses[0], "last_loss": losses[-1]}


if __name__ == "__main__":
    main()
