"""Parameters are labelled by the part they play, in the trees users have."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

import nanochat_jax as nj
from nanochat_jax.config import Config
from nanochat_jax.lm import setup


def labels(params):
    """Returns the labels of a tree by path."""
    leaves = jax.tree.leaves_with_path(nj.label_params(params))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x
            for path, x in leaves}  # fmt: skip


def of(**shapes):
    """Returns a tree of shapes, nested at `__`, and no arrays."""
    tree = {}
    for name, shape in shapes.items():
        *parents, leaf = name.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


@pytest.mark.parametrize("weight_tied", [True, False])
def test_the_model_of_the_trainer(weight_tied):
    config = Config(n_layers=2, dim=32, n_heads=2, weight_tied=weight_tied)
    found = labels(setup.abstract_model(config)[1])
    assert found.pop("embed/embedding") == "embedding"
    assert found.pop("final_norm/scale") == "vector"
    if not weight_tied:
        assert found.pop("head/kernel") == "head"
    for path, label in found.items():
        assert path.startswith("blocks/")
        assert label == ("vector" if path.endswith("norm/scale") else "matrix"), path
    kernels = ("query", "key", "value", "out", "gate", "up", "down")
    matrices = [path for path, label in found.items() if label == "matrix"]
    assert len(matrices) == 2 * len(kernels)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(16, 8)(tokens)
        x = linen.MultiHeadDotProductAttention(num_heads=2)(linen.LayerNorm()(x))
        return linen.Dense(16, name="lm_head")(linen.Dense(8)(x))


def test_a_linen_tree():
    init = lambda: Linen().init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    found = labels(jax.eval_shape(init)["params"])
    assert found.pop("Embed_0/embedding") == "embedding"
    assert found.pop("Dense_0/kernel") == "matrix"
    assert found.pop("lm_head/kernel") == "head"
    attention = "MultiHeadDotProductAttention_0"
    for name in ("query", "key", "value", "out"):  # of three axes, not heads
        assert found.pop(f"{attention}/{name}/kernel") == "matrix"
    assert set(found.values()) == {"vector"}  # biases of one and two axes, and norms


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.wte = nnx.Embed(16, 8, rngs=rngs)
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 32, rngs=rngs)
        self.lm_head = nnx.Linear(8, 16, use_bias=False, rngs=rngs)


EXPECTED = {
    "wte": {"embedding": "embedding"},
    "norm": {"scale": "vector"},
    "up": {"kernel": "matrix", "bias": "vector"},
    "lm_head": {"kernel": "head"},
}


def test_an_nnx_state_and_its_pure_dict():
    state = nnx.state(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))), nnx.Param)
    assert nnx.to_pure_dict(nj.label_params(state)) == EXPECTED
    assert nj.label_params(nnx.to_pure_dict(state)) == EXPECTED


@pytest.mark.parametrize("name", ["bias", "b", "scale", "gain", "gamma", "beta"])
def test_stacked_biases_and_gains_are_vectors(name):
    """As `nnx.vmap` and `linen.scan` make them, one row a layer."""
    assert labels(of(**{f"layers__norm__{name}": (12, 64)})) == {
        f"layers/norm/{name}": "vector"
    }


def test_stacked_kernels_are_matrices():
    assert labels(of(layers__up__kernel=(12, 64, 256))) == {
        "layers/up/kernel": "matrix"
    }


@pytest.mark.parametrize(
    "name", ["multi_head", "multihead_attention", "heads", "head_norm", "overhead"]
)
def test_attention_heads_are_no_output_heads(name):
    assert set(labels(of(**{f"{name}__query__kernel": (64, 64)})).values()) == {
        "matrix"
    }


@pytest.mark.parametrize("name", ["head", "lm_head", "unembed", "output_head", "Head"])
def test_output_heads(name):
    found = labels(of(**{f"{name}__kernel": (64, 256), f"{name}__bias": (256,)}))
    assert found == {f"{name}/kernel": "head", f"{name}/bias": "vector"}


@pytest.mark.parametrize("name", ["embed", "embed_tokens", "wte", "wpe", "WTE"])
def test_embeddings_by_the_name_of_their_module(name):
    assert labels(of(**{f"{name}__weight": (256, 64)})) == {
        f"{name}/weight": "embedding"
    }


@pytest.mark.parametrize("name", ["Embed_0", "tokens"])
def test_embeddings_by_their_own_name(name):
    assert labels(of(**{f"{name}__embedding": (256, 64)})) == {
        f"{name}/embedding": "embedding"
    }


@pytest.mark.parametrize(
    "name", ["token_embedding", "tok_embeddings", "pos_embed", "embed_positions"]
)
def test_embeddings_by_any_word_of_their_name(name):
    """As Equinox and ported checkpoints have them."""
    assert labels(of(**{f"{name}__weight": (256, 64)})) == {
        f"{name}/weight": "embedding"
    }


def test_a_single_array_and_an_empty_tree():
    assert nj.label_params(jnp.zeros((4, 4))) == "matrix"
    assert nj.label_params(jnp.zeros(4)) == "vector"
    assert nj.label_params(jnp.zeros(())) == "vector"
    assert nj.label_params({}) == {}


def test_the_labels_have_the_structure_of_the_tree_and_partition_takes_them():
    params = {"a": [jnp.ones((2, 2)), None], "head": (jnp.ones((2, 2)),)}
    found = nj.label_params(params)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    rates = {"matrix": optax.sgd(1.0), "head": optax.sgd(2.0)}
    tx = optax.partition(rates, nj.label_params)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["a"][0][0, 0] == -1
    assert updates["head"][0][0, 0] == -2
