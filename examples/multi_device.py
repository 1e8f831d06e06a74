"""8-bit Muon on eight devices, with the same result as on one.

Run it with `python examples/multi_device.py`; it takes some seconds. Eight virtual
devices on the CPU stand in for accelerators. Rows of the parameters are sharded over
them, the state of the optimizer follows, and each device orthogonalises its share of
the matrices. Only the placement of the parameters and of the data differs from training
on one device.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import nanochat_jax as nj

DEVICES, LAYERS, WIDTH, STEPS = 8, 8, 64, 30


def init(seed: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), LAYERS)
    return {
        f"layer{i}": jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5
        for i, key in enumerate(keys)
    }


def network(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    for kernel in params.values():
        x = x + jnp.tanh(x @ kernel)
    return x


def fit(devices: list[jax.Device]) -> dict[str, float]:
    mesh = jax.make_mesh(
        (len(devices),), ("fsdp",), axis_types=(AxisType.Auto,), devices=devices
    )
    params = jax.device_put(init(seed=2), NamedSharding(mesh, P("fsdp", None)))
    config = nj.OptimizerConfig(
        lr=0.05, warmup_steps=5, total_steps=STEPS, use_8bit_optim=True
    )
    # The parameters say where they are, and so where state and work belong.
    tx = nj.build_optimizer(config, params)
    state = nj.init_sharded(tx, params)
    x = jax.random.normal(jax.random.key(0), (256, WIDTH))
    y = network(init(seed=1), x)
    x, y = jax.device_put((x, y), NamedSharding(mesh, P("fsdp", None)))

    @jax.jit
    def step(params, state, x, y):
        loss_fn = lambda params: jnp.mean((network(params, x) - y) ** 2)
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(STEPS):
        params, state, loss = step(params, state, x, y)
        losses.append(float(loss))
    held = nj.bytes_per_device(state)
    return {"first_loss": losses[0], "last_loss": losses[-1], "bytes": held}


def main() -> dict[int, dict[str, float]]:
    results = {n: fit(jax.devices()[:n]) for n in (1, jax.device_count())}
    for devices, result in results.items():
        first, last, held = result.values()
        text = f"loss {first:.3f} -> {last:.4f}, state {held:,} bytes on each"
        print(f"{devices} device{'s' * (devices > 1)}: {text}")
    return results


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    main()
