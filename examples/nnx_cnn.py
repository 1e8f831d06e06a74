"""A Flax NNX convolutional network, its axes derived from its layers.

Run it with `python examples/nnx_cnn.py`; it takes a few seconds. The network tells
crosses from rings in noise. `matrix_axes(model)` asks each layer which axes of its
kernel it sums over: a convolution is a matrix of `height * width * channels in` by
`channels out`.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import nanochat_jax as nj

SIDE, STEPS = 12, 100


class Network(nnx.Module):
    """Pictures, `[batch, SIDE, SIDE, 1]`, to logits of cross and ring."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.head = nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.second(nnx.relu(self.first(x)))
        return self.head(nnx.relu(self.norm(x)).mean(axis=(1, 2)))


def pictures(key: jax.Array, count: int = 64) -> tuple[jax.Array, jax.Array]:
    """Returns noisy pictures and whether each shows a ring."""
    which, noise = jax.random.split(key)
    is_ring = jax.random.bernoulli(which, shape=(count,))
    x, y = jnp.meshgrid(*[jnp.arange(SIDE) - SIDE / 2 + 0.5] * 2)
    ring = jnp.abs(jnp.hypot(x, y) - 4) < 1
    cross = jnp.minimum(jnp.abs(x), jnp.abs(y)) < 1
    shown = jnp.where(is_ring[:, None, None], ring[None], cross[None])
    shown = shown + jax.random.normal(noise, shown.shape)
    return shown[..., None], is_ring.astype(jnp.int32)


@nnx.jit
def train_step(model: Network, optimizer: nnx.Optimizer, key: jax.Array) -> jax.Array:
    def loss_fn(model: Network) -> jax.Array:
        x, labels = pictures(key)
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def main() -> dict[str, float]:
    model = Network(nnx.Rngs(0))
    tx = nj.muon(0.05, bits=8, min_size=1, matrix_axes=nj.matrix_axes(model))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    print(nj.describe(tx, nnx.state(model, nnx.Param)))
    keys = jax.random.split(jax.random.key(1), STEPS)
    losses = [float(train_step(model, optimizer, key)) for key in keys]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.2g} in {STEPS} steps")
    return {"first_loss": losses[0], "last_loss": losses[-1]}


if __name__ == "__main__":
    main()
