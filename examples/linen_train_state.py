"""The optimizer of a configuration in Flax Linen's `TrainState`.

Run it with `python examples/linen_train_state.py`; it takes a few seconds. A small
network tells the three arms of a spiral apart. `build_optimizer` takes the keys of the
TOML files: here momentum in 8 bits and in a space of rank 32, its basis in 4 bits. What
it returns is an Optax transformation like any other.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from nanochat_jax import OptimizerConfig, build_optimizer, memory_report

CONFIG = OptimizerConfig(
    lr=0.02,
    muon_momentum=0.9,
    total_steps=100,
    use_8bit_optim=True,
    use_galore=True,
    galore_rank=32,
    galore_update_freq=20,
)


class Classifier(nn.Module):
    """Points of the plane to logits of the three arms."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = nn.gelu(nn.Dense(128)(x))
        return nn.Dense(3, name="head")(x)


def spiral(points: int) -> tuple[jax.Array, jax.Array]:
    """Returns points on three arms, `[3 * points, 2]`, and the arm of each."""
    radius = jnp.linspace(0.1, 1.0, points)[:, None]
    angle = 4 * radius + 2 * jnp.pi / 3 * jnp.arange(3)[None, :]
    xy = jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=-1)
    return xy.reshape(-1, 2), jnp.tile(jnp.arange(3), points)


@jax.jit
def train_step(
    state: TrainState, x: jax.Array, arms: jax.Array
) -> tuple[TrainState, jax.Array]:
    def loss_fn(params: optax.Params) -> jax.Array:
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, arms).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def main() -> dict[str, float]:
    model, (x, arms) = Classifier(), spiral(points=100)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    tx = build_optimizer(CONFIG, params)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    losses = []
    for _ in range(CONFIG.total_steps):
        state, loss = train_step(state, x, arms)
        losses.append(float(loss))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    report = memory_report(tx, params)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.2g} in {CONFIG.total_steps} steps")
    print(f"state {held:,} bytes; FP32 Muon + AdamW {report.fp32_muon_adamw_bytes:,}")
    print(f"left at full rank: {', '.join(report.full_rank)}")
    return {"first_loss": losses[0], "last_loss": losses[-1], "state_bytes": held}


if __name__ == "__main__":
    main()
