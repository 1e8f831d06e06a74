"""Low-rank adapters beside frozen weights.

Run it with `python examples/lora.py`; it takes a few seconds. A network that was made
at random has to follow another one, and only adapters of rank 4 beside its layers are
trained. `labels` says "frozen" of all other parameters, which then have no state and no
updates, and are left out of memory reports.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import nanochat_jax as nj

STEPS = 100


class Network(nnx.Module):
    """Points, `[batch, 32]`, to points, by way of 128 hidden units."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        lora = lambda n, m: nnx.LoRALinear(n, m, lora_rank=4, rngs=rngs)
        self.up, self.down = lora(32, 128), lora(128, 32)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.tanh(self.up(x)))


def labels(params: optax.Params) -> optax.Params:
    """Freezes all but the adapters, whose labels are left to their names."""

    def label(path, _):
        in_adapter = "lora" in jax.tree_util.keystr(path)
        return None if in_adapter else "frozen"

    return jax.tree.map_with_path(label, params)


@nnx.jit
def train_step(model, optimizer, x, y):
    loss_fn = lambda model: jnp.mean((model(x) - y) ** 2)
    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def main() -> dict[str, float]:
    model, teacher = Network(nnx.Rngs(0)), Network(nnx.Rngs(0))
    for layer in (teacher.up, teacher.down):  # as if it had been trained
        noise = jax.random.normal(jax.random.key(0), layer.lora.lora_b[...].shape)
        layer.lora.lora_b[...] = 0.3 * noise
    x = jax.random.normal(jax.random.key(1), (256, 32))
    tx = nj.muon(optax.linear_schedule(0.05, 0.0, STEPS), labels=labels)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = nnx.as_pure(nnx.state(model, nnx.Param))
    losses = [float(train_step(model, optimizer, x, teacher(x))) for _ in range(STEPS)]
    after = nnx.as_pure(nnx.state(model, nnx.Param))
    frozen = bool(jnp.array_equal(before["up"]["kernel"], after["up"]["kernel"]))
    report = nj.memory_report(tx, after)
    print(nj.describe(tx, after))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.2g} in {STEPS} steps")
    print(f"state {report.total_bytes:,} bytes for {report.total_params:,} parameters")
    return {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "frozen": frozen,
        "params": report.total_params,
    }


if __name__ == "__main__":
    main()
