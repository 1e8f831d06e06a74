"""A Flax Linen transformer whose kernels of attention have three axes.

Run it with `python examples/linen_attention.py`; it takes half a minute. Two blocks of
`nn.MultiHeadDotProductAttention` learn to repeat eight letters. Its kernels are
`[features, heads, head_dim]`, which `muon` sees as the matrices they are; `describe`
shows how each parameter is optimised, and why.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import nanochat_jax as nj

LETTERS, LENGTH, WIDTH, STEPS = 64, 8, 64, 200


class Block(nn.Module):
    """Attention and a feed-forward network, each added to its input."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(y, y, mask=mask)
        y = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH)(y)


class Repeater(nn.Module):
    """Letters, `[batch, time]`, to logits of the letter after each."""

    @nn.compact
    def __call__(self, letters: jax.Array) -> jax.Array:
        shape = (letters.shape[1], WIDTH)
        x = nn.Embed(LETTERS, WIDTH, name="embed")(letters)
        x += self.param("pos_embed", nn.initializers.normal(0.02), shape)[None]
        for _ in range(2):
            x = Block()(x, nn.make_causal_mask(letters))
        return nn.Dense(LETTERS, name="lm_head")(nn.LayerNorm()(x))


def twice(key: jax.Array) -> jax.Array:
    """Returns words of random letters, each said twice, `[32, 2 * LENGTH]`."""
    words = jax.random.randint(key, (32, LENGTH), 0, LETTERS)
    return jnp.concatenate([words, words], axis=1)


def loss_fn(params: optax.Params, letters: jax.Array) -> jax.Array:
    """Returns the loss of the second saying."""
    logits = Repeater().apply({"params": params}, letters)[:, LENGTH - 1 : -1]
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, letters[:, LENGTH:]
    ).mean()


def main() -> dict[str, float]:
    params = Repeater().init(jax.random.key(0), twice(jax.random.key(0)))["params"]
    tx = nj.muon(0.02, bits=8)
    state = tx.init(params)
    print(nj.describe(tx, params))

    @jax.jit
    def train_step(params, state, key):
        loss, grads = jax.value_and_grad(loss_fn)(params, twice(key))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for key in jax.random.split(jax.random.key(1), STEPS):
        params, state, loss = train_step(params, state, key)
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.2g} in {STEPS} steps")
    return {"first_loss": losses[0], "last_loss": losses[-1]}


if __name__ == "__main__":
    main()
