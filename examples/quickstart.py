"""Muon, and two ways for it to hold less state, on a small regression.

Run it with `python examples/quickstart.py`; it takes a few seconds. Four optimizers fit
the same network to the same data. `momentum`, `orthogonalize` and `scale_by_shape` are
links of a chain, which keep the shape of updates. `galore` changes the space in which
the transform inside it works, and `quantize_state` how its state is stored.
It prints the loss, and the bytes of the optimizer's state, counted from live arrays.
"""

import jax
import jax.numpy as jnp
import optax

import nanochat_jax as nj

STEPS = 80


def directions() -> dict[str, optax.GradientTransformation]:
    muon = optax.chain(nj.momentum(0.9), nj.orthogonalize())
    # Momentum of rank 32; the rest of the gradient passes by it, without state.
    galore = nj.galore(
        nj.momentum(0.9), rank=32, basis=nj.RandomizedSVD(20), complement=1.0
    )
    low_rank = optax.chain(galore, nj.orthogonalize())
    codecs = {"momentum": nj.Int8(128), "basis": nj.Int4(128)}
    return {
        "Muon, float32": muon,
        "8-bit Muon": nj.quantize_state(muon, {"momentum": nj.Int8(128)}),
        "GaLore": low_rank,
        "GaLore + 8-bit": nj.quantize_state(low_rank, codecs),
    }


def network(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


def init(seed: int) -> dict[str, jax.Array]:
    hidden, out = jax.random.normal(jax.random.key(seed), (2, 128, 256))
    return {"hidden": hidden / 128**0.5, "out": out.T / 256**0.5}


def fit(direction: optax.GradientTransformation) -> dict[str, float]:
    rate = optax.linear_schedule(0.05, 0.0, STEPS)
    tx = optax.chain(
        direction, nj.scale_by_shape("width"), optax.scale_by_learning_rate(rate)
    )
    x = jax.random.normal(jax.random.key(0), (256, 128))
    y = network(init(seed=1), x)
    loss_fn = lambda params: jnp.mean((network(params, x) - y) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = init(seed=2)
    state, first = tx.init(params), loss_fn(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    last = loss_fn(params)
    return {"first_loss": float(first), "last_loss": float(last), "state_bytes": held}


def main() -> dict[str, dict[str, float]]:
    results = {name: fit(direction) for name, direction in directions().items()}
    for name, result in results.items():
        first, last, held = result.values()
        print(f"{name:15} loss {first:.3f} -> {last:.2g}, state {held:,} bytes")
    return results


if __name__ == "__main__":
    main()
