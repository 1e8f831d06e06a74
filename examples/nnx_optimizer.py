"""A Flax NNX model and `nnx.Optimizer`.

Run it with `python examples/nnx_optimizer.py`; it takes a few seconds. A small network
learns to tell sixteen words of 64 bits apart, of which one bit in five is flipped. Its
optimizer has its momentum in 8 bits and in a space of rank 16.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import nanochat_jax as nj

CONFIG = nj.OptimizerConfig(
    lr=0.02,
    total_steps=100,
    use_8bit_optim=True,
    use_galore=True,
    galore_rank=16,
    galore_update_freq=20,
)
WORDS = jnp.sign(jax.random.normal(jax.random.key(0), (16, 64)))


class Reader(nnx.Module):
    """Words of 64 bits, each ±1, to logits of which word it was."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.mix = nnx.Linear(128, 64, rngs=rngs)
        self.norm = nnx.RMSNorm(64, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)  # its keys are no parameters
        self.head = nnx.Linear(64, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.mix(self.dropout(nnx.relu(self.hidden(x)))))
        return self.head(self.norm(x))


def noisy_words(key: jax.Array, count: int = 128) -> tuple[jax.Array, jax.Array]:
    """Returns words with bits flipped, `[count, 64]`, and which they were."""
    which, flipped = jax.random.split(key)
    labels = jax.random.randint(which, (count,), 0, len(WORDS))
    flips = jax.random.bernoulli(flipped, 0.2, (count, WORDS.shape[1]))
    return jnp.where(flips, -1, 1) * WORDS[labels], labels


def loss_fn(model: Reader, x: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()


@nnx.jit
def train_step(model: Reader, optimizer: nnx.Optimizer, key: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_fn)(model, *noisy_words(key))
    optimizer.update(model, grads)
    return loss


def main() -> dict[str, float]:
    model = Reader(nnx.Rngs(0))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    tx = nj.build_optimizer(CONFIG, params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    keys = jax.random.split(jax.random.key(1), CONFIG.total_steps)
    losses = [float(train_step(model, optimizer, key)) for key in keys]
    held = sum(x.nbytes for x in jax.tree.leaves(nnx.as_pure(optimizer.opt_state)))
    planned = nj.memory_report(tx, params).total_bytes
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.2g} in {CONFIG.total_steps} steps")
    print(f"state {held:,} bytes, as planned: {planned:,}")
    return {"first_loss": losses[0], "last_loss": losses[-1], "state_bytes": held}


if __name__ == "__main__":
    main()
