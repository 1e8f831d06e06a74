"""Parameters are labelled by the part they play, in the trees users have.

What names tell is in `test_names`; what modules tell, in `test_matrix_axes`.
"""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

import helpers
import nanochat_jax as nj
from nanochat_jax.config import Config
from nanochat_jax.lm.model import gpt, roles as lm_roles
from nanochat_jax.optimizer.roles import settle


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
    found = labels(gpt.abstract_model(config)[1])
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
    kernels = {
        "layers__up__kernel": (12, 64, 256),
        "layers__down__kernel": (12, 256, 64),
    }
    found = labels(of(**kernels, layers__norm__scale=(12, 64)))
    assert found["layers/up/kernel"] == found["layers/down/kernel"] == "matrix"


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


ODD = {
    "attn": {"w": jnp.ones((4, 6, 8)), "v": jnp.ones((6, 4, 8))},
    "up": {"kernel": jnp.ones((8, 24)), "bias": jnp.ones(24)},
}


def test_all_leaves_left_open_are_refused_in_one_message_with_ways_to_go_on():
    tx = nj.muon(0.02)
    with pytest.raises(ValueError, match="axes that make a matrix") as error:
        tx.init(ODD)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:3]] == [
        "  ['attn']['v'] (6, 4, 8)",
        "  ['attn']['w'] (4, 6, 8)",
    ]
    for way in ("MatrixAxes(", "matrix_axes(model)", '"vector"'):
        assert way in lines[-1]
    with pytest.raises(ValueError, match="axes that make a matrix"):
        nj.build_optimizer(nj.OptimizerConfig(), ODD)


HEADS = nj.MatrixAxes(1, (0, 2))


@pytest.mark.parametrize(
    "given",
    [
        {"attn": HEADS, "up": None},
        {"attn": {"w": HEADS, "v": HEADS}},
        lambda path, shape: HEADS if path.startswith("attn/") else None,
        {"attn": optax.contrib.MuonDimensionNumbers(1, (0, 2))},
    ],
)
def test_axes_may_be_given_for_some_leaves_and_by_prefix(given):
    roles = settle(ODD, matrix_axes=given)
    assert roles["['attn']['w']"].axes == HEADS
    assert roles["['up']['kernel']"].axes.view_shape((8, 24)) == (8, 24)
    assert roles["['up']['bias']"].label == "vector"


def test_labels_may_be_a_function_a_prefix_or_partly_left_open():
    by_function = lambda params: jax.tree.map(
        lambda x: "matrix" if x.ndim == 2 else "vector", params
    )
    prefix = {"attn": "vector", "up": {"kernel": None, "bias": "frozen"}}
    for labels, bias in ((by_function, "vector"), (prefix, "frozen")):
        assert nj.label_params(ODD, labels) == {
            "attn": {"w": "vector", "v": "vector"},
            "up": {"kernel": "matrix", "bias": bias},
        }
    with pytest.raises(ValueError, match=r"'frozen'\], got \['adam'\]"):
        nj.label_params(ODD, {"attn": "adam", "up": None})


def test_entries_for_what_is_no_parameter_are_refused_by_name():
    for argument, entry in (("labels", "vector"), ("matrix_axes", HEADS)):
        given = {"attn": {"w": entry, "v": entry, "W": entry}, "upp": entry}
        with pytest.raises(ValueError, match=rf"`{argument}` has.*") as error:
            settle(ODD, **{argument: given})
        assert [line.strip() for line in str(error.value).splitlines()[1:3]] == [
            "['attn']['W']",
            "['upp']",
        ]
    # Of what is masked or absent, they are no mistake.
    part = {"attn": None, "up": ODD["up"]}
    assert set(settle(part, labels={"attn": {"w": "vector"}})) == {
        "['up']['kernel']",
        "['up']['bias']",
    }
    tx = optax.masked(
        nj.muon(0.02, labels={"attn": "vector"}), {"attn": False, "up": True}
    )
    tx.init(ODD)


def test_axes_of_a_model_must_be_those_of_the_parameters_but_may_be_more():
    derived = nj.MatrixAxes(0, 1, source="somewhere.Linear")
    params = {"a": {"kernel": jnp.ones((4, 8))}}
    more = {"a": {"kernel": derived}, "b": {"kernel": derived, "bias": "vector"}}
    assert settle(params, matrix_axes=more)["['a']['kernel']"].axes == derived
    with pytest.raises(ValueError, match="without a key such as 'params'"):
        settle({"params": params}, matrix_axes=more)
    for wrong in (("x", "y"), (0, 1), "rows"):
        with pytest.raises(TypeError, match=r"\['a'\]\['kernel'\]"):
            settle(params, matrix_axes={"a": {"kernel": wrong}})
    with pytest.raises(ValueError, match=r"\['A'\]"):
        settle(params, matrix_axes={"A": "vector"})
    with pytest.raises(TypeError, match="takes the parameters"):
        settle(params, labels=lambda path, shape: "matrix")


@pytest.mark.parametrize(
    "name",
    ["to_logits", "lm_logits", "value_head", "policy_head", "embed_out", "LMHead_0"],
)
def test_output_layers_under_other_names(name):
    blocks = {"blocks__0__mlp__up__kernel": (8, 32)}
    found = labels(of(**blocks, **{f"{name}__kernel": (8, 100)}))
    assert found == {"blocks/0/mlp/up/kernel": "matrix", f"{name}/kernel": "head"}


def test_tables_of_published_pytorch_models():
    names = ("shared.weight", "positional_encoding", "W_E", "query_tokens")
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    params = {name: jnp.ones((10, 8)) for name in (*names, bias)}
    assert set(nj.label_params(params).values()) == {"embedding"}


def test_recurrent_weights_of_pytorch_are_out_in_with_and_without_biases():
    for biases in (
        {},
        {"rnn.bias_ih_l0": jnp.ones(24), "rnn.bias_hh_l0": jnp.ones(24)},
    ):
        params = {"rnn.weight_ih_l0": jnp.ones((24, 8)), **biases}
        role = settle(params)["['rnn.weight_ih_l0']"]
        assert role.axes.view_shape((24, 8)) == (8, 24)


def test_labels_and_axes_may_be_trees_of_nnx_variables():
    state = nnx.state(Nnx(nnx.Rngs(0)), nnx.Param)
    labels = jax.tree.map(lambda _: "vector", state)
    params = nnx.as_pure(state)
    assert set(jax.tree.leaves(nj.label_params(params, labels))) == {"vector"}
    turned = jax.tree.map(lambda x: nj.MatrixAxes(1, 0) if x.ndim == 2 else None, state)
    tx = nj.muon(0.02, matrix_axes=turned)
    views = {leaf.path: leaf.view for leaf in nj.describe(tx, state).leaves}
    assert views["up/kernel"] == (32, 8)


def test_a_list_without_names_is_refused_where_a_bias_could_be_a_matrix():
    params = [jnp.ones((8, 4, 4)), jnp.ones((4, 4)), jnp.ones(8)]
    with pytest.raises(ValueError, match=r"  \[0\](.|\n)*  \[1\]"):
        nj.muon(0.02).init(params)
    nj.muon(0.02, labels=["vector", "matrix", None]).init(params)


def test_a_label_given_by_hand_stands_before_names():
    params = {"embed": {"embedding": jnp.ones((16, 8))}}
    role = settle(params, labels={"embed": "matrix"})["['embed']['embedding']"]
    assert (role.label, role.assumed) == ("matrix", True)


def test_a_derived_kernel_may_be_a_head_and_one_given_by_hand_is_a_matrix():
    params = {"lm_head": {"kernel": jnp.ones((8, 16))}}
    derived = nj.MatrixAxes(0, 1, source="somewhere.Linear")
    label = lambda axes: nj.label_params(params, matrix_axes=lambda *_: axes)
    assert label(derived) == {"lm_head": {"kernel": "head"}}
    assert label(nj.MatrixAxes(0, 1)) == {"lm_head": {"kernel": "matrix"}}


def test_complex_parameters_are_refused_with_their_path_unless_frozen():
    params = {"w": jnp.ones((2, 2)), "phase": jnp.ones((2, 2), jnp.complex64)}
    with pytest.raises(TypeError, match=r"\['phase'\] is complex64(.|\n)*split_real"):
        nj.muon(0.02).init(params)
    nj.muon(0.02, labels={"w": None, "phase": "frozen"}).init(params)


MIXED = {
    "w": jnp.ones((4, 6)),
    "rate": 0.5,
    "name": "model",
    "activation": jnp.tanh,
    "ids": jnp.arange(3),
    "key": jax.random.key(0),
    "frozen": jnp.ones((6, 4)),
    "empty": jnp.ones((0, 8)),
}


def test_what_is_no_floating_array_is_frozen_and_has_no_state():
    tx = nj.muon(0.02, bits=8, min_size=1, labels={"frozen": "frozen"})
    state = tx.init(MIXED)
    trained = {"w": MIXED["w"], "empty": MIXED["empty"]}
    wanted = nj.muon(0.02, bits=8, min_size=1).init(trained)
    assert helpers.types(jax.tree.leaves(state)) == helpers.types(
        jax.tree.leaves(wanted)
    )
    grads = jax.tree.map(
        lambda x: x if getattr(x, "dtype", None) == jnp.float32 else None, MIXED
    )
    updates, after = tx.update(grads, state, MIXED)
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    assert helpers.types(after) == helpers.types(state)
    chex.assert_trees_all_equal(updates["frozen"], jnp.zeros((6, 4)))
    assert updates["empty"].shape == (0, 8)
    assert jnp.abs(updates["w"]).max() > 0


def test_frozen_gradients_do_not_count_in_the_norm():
    params = {"w": jnp.ones((4, 6)), "frozen": jnp.full((6, 4), 1e6)}
    tx = lambda clip: nj.muon(
        0.02, grad_clip=clip, labels={"frozen": "frozen"}, adam_learning_rate=1.0
    )
    updates = [tx(c).update(params, tx(c).init(params), params)[0] for c in (9.0, 0.0)]
    chex.assert_trees_all_close(*updates, rtol=1e-6)


def test_a_parameter_without_a_gradient_is_named():
    params = {"w": jnp.ones((4, 6)), "v": jnp.ones((4, 6))}
    tx = nj.muon(0.02)
    with pytest.raises(ValueError, match=r"no gradient:\n  \['v'\]\n.*frozen"):
        tx.update({"w": params["w"], "v": None}, tx.init(params), params)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_state_restored_as_plain_dicts_is_refused_with_the_way_on(clip):
    params = {"w": jnp.ones((4, 6))}
    tx = nj.muon(0.02, grad_clip=clip)
    raw = {"inner_states": {}}
    with pytest.raises(TypeError, match=r"`muon` needs a `PartitionState`.*eval_shape"):
        tx.update(params, {"clip": (), "by_label": raw} if clip else raw, params)


def test_an_optimizer_built_for_other_parameters_says_so():
    tx = nj.build_optimizer(nj.OptimizerConfig(), {"w": jnp.ones((4, 6))})
    with pytest.raises(ValueError, match=r"other parameters(.|\n)*\['v'\]"):
        tx.init({"v": jnp.ones((4, 6))})


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_axes_of_the_model_of_the_trainer_hang_on_no_coincidence(scan_layers):
    """With as many layers as heads, features and all else."""
    config = Config(
        n_layers=4, dim=4, n_heads=2, ffn_mult=1, vocab_size=4, weight_tied=False,
        scan_layers=scan_layers,
    )  # fmt: skip
    params = gpt.abstract_model(config)[1]
    found = settle(params, matrix_axes=lm_roles.kernel_axes)
    for path, x in jax.tree.leaves_with_path(params):
        role, name = found[jax.tree_util.keystr(path)], jax.tree_util.keystr(path)
        assert role.label == lm_roles_label(name)
        if role.label == "matrix":
            assert role.axes.resolve(x.shape).is_identity
    nj.build_optimizer(config, params, matrix_axes=lm_roles.kernel_axes).init(
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
    )


def lm_roles_label(name):
    if "embed" in name:
        return "embedding"
    if "head" in name:
        return "head"
    return "matrix" if "kernel" in name else "vector"
