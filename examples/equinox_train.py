"""An Equinox model under Muon with momentum in 8 bits.

Run it with `python examples/equinox_train.py`; it takes a few seconds. A small network
learns the ripples of a pond. What in a module is no array, such as its activation, is
`None` among the parameters, as `eqx.filter` leaves it. Kernels of Equinox are
`(out, in)`, which `muon` knows from the modules.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import nanochat_jax as nj

STEPS = 200


class Pond(eqx.Module):
    """Points of the plane to the height of the water."""

    frequencies: jax.Array
    mlp: eqx.nn.MLP

    def __init__(self, key: jax.Array) -> None:
        wave, rest = jax.random.split(key)
        self.frequencies = 4 * jax.random.normal(wave, (2, 32))
        self.mlp = eqx.nn.MLP(64, "scalar", 64, depth=2, key=rest)

    def __call__(self, point: jax.Array) -> jax.Array:
        angles = point @ self.frequencies
        return self.mlp(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)]))


@eqx.filter_value_and_grad
def loss_fn(model: Pond, points: jax.Array, heights: jax.Array) -> jax.Array:
    return jnp.mean((jax.vmap(model)(points) - heights) ** 2)


def main() -> dict[str, float]:
    model = Pond(jax.random.key(0))
    tx = nj.muon(optax.linear_schedule(0.05, 0.0, STEPS), bits=8, block_size=64)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    points = jax.random.uniform(jax.random.key(1), (512, 2), minval=-1)
    heights = jnp.cos(8 * jnp.linalg.norm(points, axis=1))

    @eqx.filter_jit
    def train_step(model, state):
        loss, grads = loss_fn(model, points, heights)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for _ in range(STEPS):
        model, state, loss = train_step(model, state)
        losses.append(float(loss))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.2g} in {STEPS} steps")
    print(f"state {held:,} bytes")
    return {"first_loss": losses[0], "last_loss": losses[-1], "state_bytes": held}


if __name__ == "__main__":
    main()
