"""Bare trees of parameters are read rightly, from paths and shapes, or refused."""

import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from nanochat_jax.optimizer.roles.layouts import read_tree
from nanochat_jax.optimizer.roles.names import words, words_of_tree

TREES = json.loads((Path(__file__).parent / "trees.json").read_text(encoding="utf-8"))

# Leaves of two and more axes that names and shapes leave open, by package.
REFUSED = {
    "flax.nnx 0.12.8 layers (nnx.state)": ["einsum/kernel/value", "lg/kernel/value"],
    "flax.linen 0.12.8 layers": ["ct/kernel", "ctt/kernel", "dg/kernel"],
    "equinox 0.13.8": ["dw/weight"],
    "keras 3.15.1 list of trainable_variables (stateless loop)": [
        "0", "1", "11", "13", "15", "16", "18", "2", "3", "4", "5", "6", "7",
    ],
}  # fmt: skip


def build(leaves):
    """Returns shapes by path, as nested dictionaries."""
    tree = {}
    for path, (shape, *_) in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    return tree


def read(tree):
    """Returns readings by path of a tree of shapes."""
    flat = {path: x.shape for path, x in jax.tree.leaves_with_path(tree)}
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): found for path, found in read_tree(flat).items()}


def sides(axes, shape):
    """Returns the axes of input and output, but for those of one entry."""
    found = axes.resolve(tuple(shape))
    longer = lambda side: {axis for axis in side if shape[axis] != 1}
    return longer(found.fan_in), longer(found.fan_out)


def is_right(found, shape, label, axes=""):
    if label.endswith("~"):  # AdamW either way
        return found.label in ("vector", "embedding", "head")
    if found.label != label or label != "matrix":
        return found.label == label
    wanted = [{int(axis) for axis in side} for side in axes.split("->")]
    longer = tuple({axis for axis in side if shape[axis] != 1} for side in wanted)
    return sides(found.axes, shape) == longer


@pytest.mark.parametrize("package", TREES)
def test_no_leaf_of_a_published_model_is_read_wrongly(package):
    leaves = TREES[package]
    found = read(build(leaves))
    settled = {path: x for path, x in found.items() if x.label is not None}
    wrong = {path: x for path, x in settled.items() if not is_right(x, *leaves[path])}
    assert not wrong
    refused = {path: x.reason for path, x in found.items() if x.label is None}
    assert sorted(refused) == REFUSED.get(package, []), refused


def test_few_leaves_are_refused():
    assert sum(map(len, REFUSED.values())) <= 40


STACKED = [name for name in TREES if name.startswith(("flax", "gemma", "google-tunix"))]


@pytest.mark.parametrize("package", STACKED)
def test_a_stack_of_models_is_read_as_one_model(package):
    """The axes count from the end, so they are those of the model before it."""
    one = {path: tuple(leaf[0]) for path, leaf in TREES[package].items()}
    many = read_tree({path: (5, *shape) for path, shape in one.items()})
    for path, found in read_tree(one).items():
        if found.label is not None:
            assert many[path][:2] == found[:2], path


@pytest.mark.parametrize("package", TREES)
def test_a_container_around_a_model_changes_nothing(package):
    one = {path: tuple(leaf[0]) for path, leaf in TREES[package].items()}
    held = read_tree({f"params/net/{path}": shape for path, shape in one.items()})
    assert {f"params/net/{path}": x for path, x in read_tree(one).items()} == held


def test_paths_of_all_kinds_have_the_same_words():
    key = jax.tree_util
    dict_, attr, index = key.DictKey, key.GetAttrKey, key.SequenceKey
    wanted = ("layers", "0", "Conv_0", "kernel")
    assert words("layers.0.Conv_0.kernel") == wanted
    assert words("layers/0/Conv_0/kernel") == wanted
    assert words((dict_(("layers", 0)), dict_("Conv_0/kernel"))) == wanted
    assert words((attr("layers"), index(0), attr("Conv_0"), attr("kernel"))) == wanted
    assert words((key.FlattenedIndexKey(0),)) == ("0",)
    assert words(()) == ()


def test_what_only_holds_the_array_is_no_name():
    wrappers = ("value", "raw_value", "data_array", "array", "0")
    paths = [f"up/bias/{name}" for name in wrappers]
    for path in paths:
        assert words_of_tree([path]) == {path: ("up", "bias")}
    both = ["mha/query", "mha/value"]
    assert [*words_of_tree(both).values()] == [("mha", "query"), ("mha", "value")]


NAMES = {
    "vector": """x/bias x/b norm/scale ln/offset bn/gamma bn/beta x/gain norm1/weight
        ln1/weight ln_x/weight layers/ln/weight rms/weight bn/weight gn/weight A_log
        batch_norm/scale layer_norm/weight input_layernorm/w dt_bias bias_ih bias_n
        q_bias lambda_q1 conv_norm/weight lstm/bias head/bias embed/bias
        embeddings/LayerNorm/weight pre_norm/scale.weights""",
    "embedding": """embed/embedding embed/weight wte/weight wpe/embedding emb/weight
        embedder/w tok_emb pos_emb pos_embs embeds pos_embed position_embeddings WTE/w
        cls_token reg_tokens class_token mask_token embedder.embeddings
        model.embed_tokens.weight embeddings/word_embeddings/weight Embed_0/embedding
        embedder/input_embedding embed/tokens""",
    "head": """head/kernel lm_head/kernel lm_head.weight unembed/w unembedding/kernel
        output_head/kernel classifier/kernel classifier_head/kernel logits/w
        logits_dense/kernel output_projection/kernel Head/kernel output/kernel
        outputs/kernel out/weight decoder/kernel mlm_head/linear_out/weight lm_head
        decoder/outputs/kernel""",
    "matrix": """attention/output/kernel layers_0/attention/output/kernel
        patch_embed/proj/kernel embedding/Dense_0/kernel att/w1 multi_head/query/kernel
        encoder/embedding/patchifier/kernel time_embedding/linear_1/kernel heads/kernel
        time_embedding/linear_1/weight embedding_conv/kernel pre_logits/kernel
        overhead/kernel attn/out/kernel layers/0/out/kernel head_norm/query/kernel
        decoder/layers_0/up/kernel self_attn/output_projection/kernel
        attn.in_proj_weight embed/kernel norm_proj/weight moe/logits/kernel""",
}


@pytest.mark.parametrize(
    ("label", "name"), [(x, name) for x, all_ in NAMES.items() for name in all_.split()]
)
def test_labels_by_name(label, name):
    assert read_tree({name: (12, 64)})[name].label == label


def test_a_layer_without_a_name_is_a_head_only_if_it_leads_to_a_vocabulary():
    tree = {"Embed_0/embedding": (50, 16), "block/Dense_0/kernel": (16, 50)}
    found = read_tree({**tree, "Dense_0/kernel": (16, 50)})
    assert found["Dense_0/kernel"].label == "head"
    assert found["block/Dense_0/kernel"].label == "matrix"
    found = read_tree({**tree, "Dense_0/kernel": (16, 48)})
    assert found["Dense_0/kernel"].label == "matrix"


def test_b_beside_a_is_a_factor_of_lora_and_else_a_bias():
    found = read_tree({"up/lora/a": (8, 2), "up/lora/b": (2, 4), "down/b": (2, 4)})
    assert [x.label for x in found.values()] == ["matrix", "matrix", "vector"]


def test_two_axes_are_in_and_out_unless_name_or_bias_say_otherwise():
    tree = {"a/W": (8, 4), "b/W": (8, 4), "b/b": (8,), "c/weight": (8, 4), "d": (8, 4)}
    found = read_tree(tree)
    views = [x.axes.view_shape((8, 4)) for x in found.values() if x.axes]
    assert views == [(8, 4), (4, 8), (4, 8), (8, 4)]
    assert [path for path, x in found.items() if x.assumed] == ["d"]


def test_trees_without_names():
    assert read_tree({"0": (4, 8), "1": (8,)})["0"].assumed
    found = read_tree({"0": (4, 8), "1": (4, 2, 2), "2": (4,)})
    assert [x.label for x in found.values()] == [None, None, "vector"]
    assert read_tree({(): (4, 8)})[()].label == "matrix"


def test_convolutions_without_a_bias_need_a_name_or_a_norm_beside_them():
    kernel, norm = (3, 3, 8, 16), {"block_0/bn/scale": (16,)}
    found = read_tree({"block_0/conv/kernel": kernel, **norm})["block_0/conv/kernel"]
    assert sides(found.axes, kernel) == ({0, 1, 2}, {3})
    assert read_tree({"Conv_0/kernel": (3, 8, 16)})["Conv_0/kernel"].label == "matrix"
    for name in ("block_0/convs/kernel", "conv/kernel"):  # each may be a stack
        assert read_tree({name: kernel, **norm})[name].label is None


def test_refusals_name_the_readings_that_are_left():
    found = read_tree({"query/kernel": (64, 4, 16), "key/kernel": (64, 4, 16)})
    reason = found["query/kernel"].reason
    assert "axes for heads" in reason
    assert "plain attention, stacked on axis 0" in reason
    found = read_tree({"mlp/gating_einsum": (2, 8, 8), "mlp/linear": (8, 8)})
    assert found["mlp/gating_einsum"].label is None


# Layouts as the frameworks have them: the axes, then input and output.
HEADS = {
    **{f"mha/{x}/kernel": "DHK D->HK" for x in ("query", "key", "value")},
    "mha/out/kernel": "HKD HK->D",
}
HEADS_BIAS = {f"mha/{x}/bias": "HK" for x in ("query", "key", "value")}
HEADS_BIAS["mha/out/bias"] = "D"
PLAIN = {
    **{f"attn/{x}/kernel": "DP D->P" for x in ("query", "key", "value")},
    "attn/out/kernel": "PD P->D",
}
NORMS = {"ln/scale": "D", "ln2/scale": "D"}
DENSE = {"Dense_0/kernel": "DF D->F", "Dense_1/kernel": "FD F->D"}
DENSE_BIAS = {"Dense_0/bias": "F", "Dense_1/bias": "D"}
MLP = {
    "mlp/up/kernel": "DF D->F",
    "mlp/gate/kernel": "DF D->F",
    "mlp/down/kernel": "FD F->D",
}
SAMPLERS = {"up/kernel": "33DF 33D->F", "down/kernel": "33FD 33F->D"}
TURNED = {
    **{f"att/{x}_proj/weight": "PD D->P" for x in ("query", "key", "value")},
    "att/output_proj/weight": "DP P->D",
    "att/query_proj/bias": "P",
    "up_proj/weight": "FD D->F",
    "down_proj/weight": "DF F->D",
}
GEMMA = {
    "attn/q_einsum/w": "HDK D->HK",
    "attn/kv_einsum/w": "2GDK D->GK",
    "attn/attn_vec_einsum/w": "HKD HK->D",
    "attn/_key_norm/scale": "K",
    "pre_norm/scale": "D",
    "mlp/gating_einsum": "2FD D->F",
    "mlp/linear": "FD F->D",
}
TUNIX = {
    "attn/q_proj/w": "DHK D->HK",
    "attn/k_proj/w": "DGK D->GK",
    "attn/o_proj/w": "HKD HK->D",
    "input_layernorm/w": "D",
    "mlp/gate_proj": "EDF D->F",
    "mlp/down_proj": "EFD F->D",
}
MAXTEXT = {
    "pre_norm/scale": "D",
    "MoeBlock_0/gate/kernel": "DE D->E",
    "MoeBlock_0/wi_0": "EDF D->F",
    "MoeBlock_0/wo": "EFD F->D",
}
CONVS = {
    "Conv_0/kernel": "33DF 33D->F",
    "Conv_0/bias": "F",
    "ConvTranspose_0/kernel": "33DF 33D->F",
    "ConvTranspose_0/bias": "F",
    "conv2_d_transpose/w": "33SD 33D->S",
    "conv2_d_transpose/b": "S",
    "conv/weight": "FD33 D33->F",
    "conv/bias": "F11",
}
LORA = {
    "q/lora_a": "DR D->R",
    "q/lora_b": "RHK R->HK",
    "o/lora_a": "HKR HK->R",
    "o/lora_b": "RD R->D",
}
GENERAL = {
    "dg/kernel": "DHK D->HK",
    "dg/bias": "HK",
    "dg2/kernel": "HKD HK->D",
    "dg2/bias": "D",
}
PENZAI = {
    "attention/query.weights": "DGQK D->GQK",
    "attention/key.weights": "DGK D->GK",
    "attention/output.weights": "GQKD GQK->D",
    "pre_norm/scale.weights": "D",
}
MODULES = [
    HEADS, HEADS | HEADS_BIAS, HEADS | NORMS | MLP, HEADS | HEADS_BIAS | NORMS | DENSE,
    PLAIN, PLAIN | NORMS | MLP, DENSE | DENSE_BIAS, DENSE | NORMS, MLP, TURNED,
    TURNED | {"norm/weight": "D"}, GEMMA, TUNIX, MAXTEXT, CONVS, SAMPLERS,
    SAMPLERS | {"norm/scale": "D"}, CONVS | {"bn/scale": "F"}, LORA, LORA | NORMS,
    GENERAL, GENERAL | NORMS, PENZAI,
]  # fmt: skip


def laid_out(layout, sizes, axis, stack):
    """Returns the shape of a leaf, and its sides if it is a matrix.

    Args:
      layout: Letters of the axes, then of input and output.
      sizes: Sizes by letter.
      axis: Axis on which it is stacked, or `None`.
      stack: How often.
    """
    letters, _, maps = layout.partition(" ")
    shape = [sizes[x] for x in letters]
    made = [letters.index(x) for x in maps.partition("->")[2]]
    batch = [i for i, x in enumerate(letters) if x not in maps]
    taken = [i for i in range(len(letters)) if i not in (*made, *batch)]
    if axis is not None:
        place = len(shape) if axis < 0 else min(axis, len(shape))
        shape.insert(place, stack)
        made, taken = ([i + (i >= place) for i in x] for x in (made, taken))
    longer = lambda side: {i for i in side if shape[i] != 1}
    return tuple(shape), (longer(taken), longer(made)) if maps else None


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_sizes_leaves_are_read_rightly_or_refused(seed):
    """Sizes that agree by chance must not make a wrong reading the only one."""
    draw = random.Random(seed)
    pool = draw.choice([[2, 3, 4, 6], [7, 12, 16, 24, 48], [1, 2, 4, 64]])
    settled = 0
    for module in MODULES * 3:
        sizes = {x: draw.choice(pool[1:]) for x in "DFKPS"}
        sizes |= {x: draw.choice(pool) for x in "EGQR"}
        sizes |= {"H": sizes["G"] * draw.choice([1, 2]), "1": 1, "2": 2, "3": 3}
        axis, stack = draw.choice([None, 0, 0, 1, -1]), draw.choice(pool)
        top = draw.choice(["", "blocks/", "layer_0/", "ScanBlock_0/"])
        laid = {top + x: laid_out(y, sizes, axis, stack) for x, y in module.items()}
        tree = {path: shape for path, (shape, _) in laid.items()}
        if draw.random() < 0.5:
            tree |= {"final_norm/scale": (sizes["D"],), "lm_head/w": (sizes["D"], 50)}
        found = read_tree(tree)
        for path, (shape, wanted) in laid.items():
            given = found[path]
            if wanted is None:
                assert given.label == "vector", (path, tree)
            elif given.label is not None:
                assert given.label == "matrix", (path, tree)
                assert sides(given.axes, shape) == wanted, (path, given, tree)
                settled += 1
    assert settled > 100
