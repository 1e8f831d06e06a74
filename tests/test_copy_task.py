"""Attention as frameworks write it learns under one line, with no word about axes.

Letters are said twice; the second saying can be known. On the wrong axes the loss stays
near that of chance, `log 64` = 4.16.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import nanochat_jax as nj

LETTERS, LENGTH, WIDTH, HEADS, STEPS = 64, 8, 64, 4, 200
OPTIMIZERS = {
    "muon": lambda params: nj.muon(0.02, bits=8),
    "build_optimizer": lambda params: nj.build_optimizer(
        nj.OptimizerConfig(lr=0.02, use_8bit_optim=True, total_steps=10**6), params
    ),
}


def twice(key):
    words = jax.random.randint(key, (32, LENGTH), 0, LETTERS)
    return jnp.concatenate([words, words], axis=1)


def loss_of(logits, letters):
    return optax.softmax_cross_entropy_with_integer_labels(
        logits[:, LENGTH - 1 : -1], letters[:, LENGTH:]
    ).mean()


def linen_model():
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(y, y, mask=mask)
            y = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
            return x + nn.Dense(WIDTH)(y)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, letters):
            x = nn.Embed(LETTERS, WIDTH, name="embed")(letters)
            shape = (letters.shape[1], WIDTH)
            x += self.param("pos_embed", nn.initializers.normal(0.02), shape)[None]
            for _ in range(2):
                x = Block()(x, nn.make_causal_mask(letters))
            return nn.Dense(LETTERS, name="lm_head")(nn.LayerNorm()(x))

    params = Model().init(jax.random.key(0), twice(jax.random.key(0)))["params"]
    return params, lambda params, letters: Model().apply({"params": params}, letters)


def nnx_model():
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
            self.attention = nnx.MultiHeadAttention(
                HEADS, WIDTH, decode=False, rngs=rngs
            )
            self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
            self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x, mask):
            x = x + self.attention(self.norms[0](x), mask=mask)
            return x + self.down(nnx.gelu(self.up(self.norms[1](x))))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(LETTERS, WIDTH, rngs=rngs)
            self.pos_embed = nnx.Param(
                0.02 * jax.random.normal(rngs.params(), (2 * LENGTH, WIDTH))
            )
            self.blocks = nnx.List([Block(rngs) for _ in range(2)])
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.lm_head = nnx.Linear(WIDTH, LETTERS, rngs=rngs)

        def __call__(self, letters):
            x = self.embed(letters) + self.pos_embed[...][None]
            for block in self.blocks:
                x = block(x, nnx.make_causal_mask(letters))
            return self.lm_head(self.norm(x))

    graph, params = nnx.split(Model(nnx.Rngs(0)))
    apply = lambda params, letters: nnx.merge(graph, params)(letters)
    return nnx.as_pure(params), apply


def equinox_model():
    import equinox as eqx

    mask = jnp.tril(jnp.ones((2 * LENGTH, 2 * LENGTH), bool))

    class Block(eqx.Module):
        norms: list
        attention: eqx.nn.MultiheadAttention
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.norms = [eqx.nn.LayerNorm(WIDTH) for _ in range(2)]
            self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
            self.up = eqx.nn.Linear(WIDTH, 4 * WIDTH, key=keys[1])
            self.down = eqx.nn.Linear(4 * WIDTH, WIDTH, key=keys[2])

        def __call__(self, x):
            y = jax.vmap(self.norms[0])(x)
            x = x + self.attention(y, y, y, mask=mask)
            y = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norms[1])(x)))
            return x + jax.vmap(self.down)(y)

    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        pos_embed: jax.Array
        blocks: list
        norm: eqx.nn.LayerNorm
        lm_head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 5)
            self.embed = eqx.nn.Embedding(LETTERS, WIDTH, key=keys[0])
            self.pos_embed = jax.random.normal(keys[1], (2 * LENGTH, WIDTH))
            self.blocks = [Block(key) for key in keys[2:4]]
            self.norm = eqx.nn.LayerNorm(WIDTH)
            self.lm_head = eqx.nn.Linear(WIDTH, LETTERS, key=keys[4])

        def __call__(self, letters):
            x = self.embed.weight[letters] + self.pos_embed
            for block in self.blocks:
                x = block(x)
            return jax.vmap(self.lm_head)(jax.vmap(self.norm)(x))

    params, static = eqx.partition(Model(jax.random.key(0)), eqx.is_inexact_array)
    apply = lambda params, letters: jax.vmap(eqx.combine(params, static))(letters)
    return params, apply


MODELS = {"linen": linen_model, "nnx": nnx_model, "equinox": equinox_model}


# That of linen under `muon` is `examples/linen_attention.py`.
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("framework", MODELS)
def test_attention_learns_to_copy(framework, optimizer):
    params, apply = MODELS[framework]()
    tx = OPTIMIZERS[optimizer](params)

    @jax.jit
    def step(params, state, key):
        letters = twice(key)
        loss_fn = lambda params: loss_of(apply(params, letters), letters)
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = tx.init(params)
    for key in jax.random.split(jax.random.key(1), STEPS):
        params, state, loss = step(params, state, key)
    assert loss < 0.05
