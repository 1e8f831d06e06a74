"""A training loop of your own: a Flax NNX model, and transforms of this library.

Run it with `python examples/flax_train_loop.py`; it takes a few seconds. A small model
learns addition modulo 31. Its matrices are trained by Muon with 8-bit momentum, its
embedding, head, biases and norm by Adam: `optax.partition` sends each parameter to its
transform by the label that `label_params` reads off its path.

The model is split once into structure and parameters, so that the step is a pure
function under `jax.jit`, which may reuse the memory of the state it is given.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import nanochat_jax as nj

MODULUS = 31
STEPS = 150


class Adder(nnx.Module):
    """Two numbers, embedded side by side, to logits of their sum."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(MODULUS, 32, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.mix = nnx.Linear(128, 128, rngs=rngs)
        self.head = nnx.Linear(128, MODULUS, rngs=rngs)

    def __call__(self, pairs: jax.Array) -> jax.Array:
        x = self.norm(self.embed(pairs).reshape(len(pairs), -1))
        return self.head(jax.nn.gelu(self.mix(jax.nn.gelu(self.hidden(x)))))


def optimizer() -> optax.GradientTransformationExtraArgs:
    direction = optax.chain(nj.momentum(0.9), nj.orthogonalize())
    muon = optax.chain(
        nj.quantize_state(direction, {"momentum": nj.Int8(block_size=128)}),
        nj.scale_by_shape("width"),
        optax.scale_by_learning_rate(0.01),
    )
    adam = optax.adam(0.003)
    others = dict.fromkeys(("embedding", "head", "vector"), adam)
    return optax.partition({"matrix": muon, **others}, nj.label_params)


def make_train_step(graphdef: nnx.GraphDef, tx: optax.GradientTransformation):
    def loss_fn(params: nnx.State, pairs: jax.Array) -> jax.Array:
        logits, sums = nnx.merge(graphdef, params)(pairs), pairs.sum(1) % MODULUS
        return optax.softmax_cross_entropy_with_integer_labels(logits, sums).mean()

    def train_step(params: nnx.State, state: optax.OptState, pairs: jax.Array):
        loss, grads = jax.value_and_grad(loss_fn)(params, pairs)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(train_step, donate_argnums=(0, 1))


def main() -> dict[str, float]:
    graphdef, params = nnx.split(Adder(nnx.Rngs(0)))
    tx, losses = optimizer(), []
    planned = nj.memory_report(tx, params)  # allocates nothing
    state, train_step = tx.init(params), make_train_step(graphdef, tx)
    pairs = jnp.indices((MODULUS, MODULUS)).reshape(2, -1).T  # all of them
    for _ in range(STEPS):
        params, state, loss = train_step(params, state, pairs)
        losses.append(float(loss))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.2g} in {STEPS} steps")
    print(f"state {held:,} bytes, as planned: {planned.total_bytes:,}")
    return {"first_loss": losses[0], "last_loss": losses[-1], "state_bytes": held}


if __name__ == "__main__":
    main()
