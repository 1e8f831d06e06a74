"""Modules say which axes of their parameters are the matrix."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

from nanochat_jax import MatrixAxes, describe, muon
from nanochat_jax.interop import in_tree, matrix_axes

KEY = jax.random.key(0)
LAYERS = 3
is_answer = lambda x: x is None or isinstance(x, MatrixAxes)


def by_path(tree):
    """Returns answers, or arrays, by path; the names of wrappers are left out."""
    return {
        tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", ""))))
              for key in path): leaf
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_answer)
    }  # fmt: skip


def view(axes, kernel):
    return np.asarray(axes.resolve(kernel.shape).to_view(kernel))


def text(answer, shape):
    """Returns axes as text, such as "0->12"; those of one entry are left out."""
    if not isinstance(answer, MatrixAxes):
        return answer
    sides = (answer.fan_in, answer.fan_out)
    return "->".join("".join(str(i) for i in side if shape[i] > 1) for side in sides)


def filled(tree):
    """Returns arrays for shapes, unlike one another."""
    draw = np.random.default_rng(0).normal
    number = lambda x: jnp.asarray(draw(size=x.shape), x.dtype)
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    return jax.tree.map(lambda x: number(x) if is_shape(x) else x, tree)


def nnx_filled(make):
    """Returns an NNX module, as its abstract twin says it is."""
    graph, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, filled(state))


def assert_is_the_map(axes, kernel, layer, shape):
    """Checks that a layer multiplies its flattened input by the view of its kernel.

    Its bias is what it makes of nothing.
    """
    seen = view(axes, kernel)
    basis = np.eye(seen.shape[0], dtype=np.float32).reshape(-1, *shape)
    layer = jax.jit(jax.vmap(layer))
    rows = layer(basis) - layer(0 * basis)
    np.testing.assert_allclose(rows.reshape(len(basis), -1), seen, rtol=1e-4, atol=1e-5)


# One layer: what it makes of unit vectors are the rows of the view.


NNX_LAYERS = {
    "Linear": (lambda rngs: nnx.Linear(3, 5, rngs=rngs), (3,)),
    "LinearGeneral": (
        lambda rngs: nnx.LinearGeneral((3, 4), (2, 5), axis=(-2, -1), rngs=rngs), (3, 4)
    ),
    "Einsum": (
        lambda rngs: nnx.Einsum("ba,xbya->xy", (2, 3, 5, 4), rngs=rngs), (3, 4)
    ),
    "Conv": (
        lambda rngs: nnx.Conv(3, 5, (2, 4), padding="VALID", rngs=rngs), (2, 4, 3)
    ),
    "query": (lambda rngs: nnx_attention(rngs).query, (6,)),
    "out": (lambda rngs: nnx_attention(rngs).out, (2, 4)),
}  # fmt: skip


def nnx_attention(rngs):
    return nnx.MultiHeadAttention(2, 6, 8, 5, decode=False, rngs=rngs)


@pytest.mark.parametrize("name", NNX_LAYERS)
def test_the_view_of_an_nnx_kernel_is_the_map_of_its_layer(name):
    make, shape = NNX_LAYERS[name]
    layer = nnx_filled(lambda: make(nnx.Rngs(0)))
    axes = matrix_axes(layer)["kernel"]
    assert_is_the_map(axes, layer.kernel[...], layer, shape)


def test_lora_is_two_matrices():
    layer = nnx_filled(lambda: nnx.LoRA(3, 2, 5, rngs=nnx.Rngs(0)))
    axes = matrix_axes(layer)
    a, b = (
        view(axes[name], getattr(layer, name)[...]) for name in ("lora_a", "lora_b")
    )
    np.testing.assert_allclose(layer(np.eye(3, dtype=np.float32)), a @ b, rtol=1e-4)


LINEN_LAYERS = {
    "Dense": (nn.Dense(5), (3,)),
    "DenseGeneral": (nn.DenseGeneral((2, 5), axis=(-2, -1)), (3, 4)),
    "DenseGeneral of other axes": (nn.DenseGeneral(5, axis=(0, 2)), (3, 1, 4)),
    "Einsum": (nn.Einsum((2, 3, 5, 4), "ba,xbya->xy"), (3, 4)),
    "Conv": (nn.Conv(5, (2, 4), padding="VALID"), (2, 4, 3)),
}


@pytest.mark.parametrize("name", LINEN_LAYERS)
def test_the_view_of_a_linen_kernel_is_the_map_of_its_layer(name):
    layer, shape = LINEN_LAYERS[name]
    variables = filled(jax.eval_shape(layer.init, KEY, jnp.ones(shape)))
    axes = matrix_axes(layer, jax.ShapeDtypeStruct(shape, jnp.float32))["kernel"]
    apply = lambda x: layer.apply(variables, x)
    assert_is_the_map(axes, variables["params"]["kernel"], apply, shape)


EQUINOX_LAYERS = {
    "Linear": (lambda: eqx.nn.Linear(3, 5, key=KEY), (3,)),
    "Linear from a scalar": (lambda: eqx.nn.Linear("scalar", 5, key=KEY), ()),
    "Linear to a scalar": (lambda: eqx.nn.Linear(3, "scalar", key=KEY), (3,)),
    "Conv2d": (lambda: eqx.nn.Conv2d(3, 5, (2, 4), key=KEY), (3, 2, 4)),
}


@pytest.mark.parametrize("name", EQUINOX_LAYERS)
def test_the_view_of_an_equinox_weight_is_the_map_of_its_layer(name):
    make, shape = EQUINOX_LAYERS[name]
    layer = filled(eqx.filter_eval_shape(make))
    assert_is_the_map(matrix_axes(layer).weight, layer.weight, layer, shape)


# Kernels whose layers are no one product: the rule of their shapes.


def nnx_conv(rngs, *features, **kwargs):
    return nnx.Conv(*features, (3, 2), rngs=rngs, **kwargs)


RULES = {
    "nnx grouped": (lambda r: nnx_conv(r, 6, 4, feature_group_count=2), "012->3"),
    "nnx by channel": (lambda r: nnx_conv(r, 6, 6, feature_group_count=6), "01->3"),
    "nnx transpose": (lambda r: nnx.ConvTranspose(6, 4, (3, 2), rngs=r), "012->3"),
    "nnx transposed": (
        lambda r: nnx.ConvTranspose(6, 4, (3, 2), transpose_kernel=True, rngs=r),
        "013->2",
    ),
    "nnx experts": (lambda r: nnx.Einsum("enf,efg->eng", (4, 3, 5), rngs=r), "1->2"),
    "nnx diagonal": (lambda r: nnx.Einsum("nhd,hd->nhd", (2, 3), rngs=r), "vector"),
    "nnx batch": (lambda r: nnx.LinearGeneral(3, 5, batch_axis={0: 4}, rngs=r), "1->2"),
    "linen transpose": (nn.ConvTranspose(4, (3, 2)), "012->3"),
    "linen transposed": (nn.ConvTranspose(4, (3, 2), transpose_kernel=True), "013->2"),
    "linen local": (nn.ConvLocal(4, (3, 2)), "2->3"),
    "linen batch": (nn.DenseGeneral(4, batch_dims=0), "1->2"),
    "equinox grouped": (lambda: eqx.nn.Conv2d(6, 4, 3, groups=2, key=KEY), "123->0"),
    "equinox by channel": (lambda: eqx.nn.Conv2d(6, 6, 3, groups=6, key=KEY), "23->0"),
    "equinox transpose": (lambda: eqx.nn.ConvTranspose2d(6, 4, 3, key=KEY), "123->0"),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_kernels_have_the_axes_that_their_layout_says(name):
    make, expected = RULES[name]
    if name.startswith("linen"):
        inputs = jnp.ones((1, 8, 8, 6))
        answer = matrix_axes(make, inputs)["kernel"]
        shape = jax.eval_shape(make.init, KEY, inputs)["params"]["kernel"].shape
    elif name.startswith("nnx"):
        layer = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
        answer, shape = matrix_axes(layer)["kernel"], layer.kernel.shape
    else:
        layer = eqx.filter_eval_shape(make)
        answer, shape = matrix_axes(layer).weight, layer.weight.shape
    assert text(answer, shape) == expected


# Models: the same of each layer, whatever is around it.


class NnxBlock(nnx.Module):
    def __init__(self, rngs, width=8, heads=2):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.lora = nnx.LoRA(width, 2, width, rngs=rngs)
        self.up = nnx.Linear(width, 12, use_bias=False, rngs=rngs)
        self.square = nnx.Linear(width, width, rngs=rngs)


class NnxModel(nnx.Module):
    def __init__(self, rngs, axis=0, layers=LAYERS, width=8, heads=2):
        make = nnx.vmap(
            lambda key: NnxBlock(nnx.Rngs(key), width, heads), out_axes=axis
        )
        self.embed = nnx.Embed(16, width, rngs=rngs)
        self.blocks = make(jax.random.split(KEY, layers))
        self.gate = nnx.Param(jnp.ones((width, width)))
        self.list = nnx.List([nnx.BatchNorm(width, rngs=rngs), nnx.PReLU()])
        self.cell = nnx.OptimizedLSTMCell(width, 5, rngs=rngs)
        self.norm = nnx.WeightNorm(nnx.Linear(width, 3, rngs=rngs), rngs=rngs)


class LinenBlock(nn.Module):
    width: int = 8
    heads: int = 2

    @nn.compact
    def __call__(self, x, _):
        x = nn.MultiHeadDotProductAttention(self.heads, name="attention")(x)
        x = nn.remat(nn.Dense)(12, name="up")(nn.LayerNorm(name="norm")(x))
        return nn.WeightNorm(nn.Dense(self.width, name="square"), name="wn")(x), None


class LinenModel(nn.Module):
    axis: int = 0
    layers: int = LAYERS
    width: int = 8
    heads: int = 2

    @nn.compact
    def __call__(self, tokens, train):
        x = nn.Embed(16, self.width, name="embed")(tokens)
        self.param("gate", nn.initializers.ones, (self.width, self.width))
        scan = nn.scan(
            LinenBlock,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = scan(self.width, self.heads, name="blocks")(x, None)
        x = nn.Dropout(0.1, deterministic=not train)(
            nn.BatchNorm(not train, name="bn")(x)
        )
        return nn.RNN(nn.GRUCell(5, name="cell"), name="rnn")(x)


class EquinoxBlock(eqx.Module):
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    square: eqx.nn.Linear

    def __init__(self, key, width=8, heads=2):
        self.norm = eqx.nn.LayerNorm(width)
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=key)
        self.up = eqx.nn.Linear(width, 12, key=key)
        self.square = eqx.nn.Linear(width, width, key=key)


class EquinoxModel(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: EquinoxBlock
    gate: jax.Array
    list: list
    cell: eqx.nn.LSTMCell
    activation: object = jnp.tanh
    rate: float = 0.5

    def __init__(self, axis=0, layers=LAYERS, width=8, heads=2):
        self.embed = eqx.nn.Embedding(16, width, key=KEY)
        make = lambda key: EquinoxBlock(key, width, heads)
        out_axes = eqx.if_array(axis)
        self.blocks = eqx.filter_vmap(make, out_axes=out_axes)(
            jax.random.split(KEY, layers)
        )
        self.gate = jnp.ones((width, width))
        linear = eqx.nn.Linear(width, 3, key=KEY)
        self.list = [
            eqx.nn.BatchNorm(width, "batch", mode="batch"),
            eqx.nn.WeightNorm(linear),
            eqx.nn.SpectralNorm(linear, "weight", key=KEY),
            eqx.nn.PReLU(),
        ]
        self.cell = eqx.nn.LSTMCell(width, 5, key=KEY)


def nnx_case(axis, **sizes):
    model = nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0), axis, **sizes))
    return matrix_axes(model), nnx.as_pure(nnx.state(model, nnx.Param))


def linen_case(axis, **sizes):
    model, inputs = LinenModel(axis, **sizes), (jnp.zeros((1, 4), jnp.int32), False)
    params = jax.eval_shape(lambda: model.init(KEY, *inputs))["params"]
    return matrix_axes(model, *inputs), params


def equinox_case(axis, **sizes):
    model = eqx.filter_eval_shape(EquinoxModel, axis, **sizes)
    return matrix_axes(model), eqx.filter(model, lambda x: hasattr(x, "shape"))


CASES = {"nnx": nnx_case, "linen": linen_case, "equinox": equinox_case}
case = pytest.mark.parametrize("name", CASES)


def texts(tree, params):
    """Returns all answers as text by path."""
    shapes = {
        path: x.shape for path, x in by_path(params).items() if hasattr(x, "shape")
    }
    answers = by_path(tree)
    return {
        "/".join(path): text(answers[path], shape) for path, shape in shapes.items()
    }


ATTENTION_FLAX = {
    f"attention/{part}/{name}": ("01->2" if part == "out" else "0->12")
    if name == "kernel"
    else "vector"
    for part in ("query", "key", "value", "out")
    for name in ("kernel", "bias")
}
BLOCKS = {
    "nnx": ATTENTION_FLAX
    | dict.fromkeys(
        ("lora/lora_a", "lora/lora_b", "up/kernel", "square/kernel"), "0->1"
    )
    | dict.fromkeys(("norm/scale", "norm/bias", "square/bias"), "vector"),
    "linen": ATTENTION_FLAX
    | dict.fromkeys(("up/kernel", "square/kernel"), "0->1")
    | dict.fromkeys(("norm/scale", "norm/bias", "up/bias", "square/bias"), "vector")
    | {"wn/square/kernel/scale": "vector"},
    "equinox": {
        f"{name}/weight": "1->0"
        for name in (
            *(f"attention/{part}_proj" for part in ("query", "key", "value", "output")),
            "up",
            "square",
        )
    }
    | dict.fromkeys(("norm/weight", "norm/bias", "up/bias", "square/bias"), "vector"),
}
AROUND = {
    "nnx": {
        "embed/embedding": "embedding",
        "gate": None,
        "list/0/scale": "vector",
        "list/0/bias": "vector",
        "list/1/negative_slope": "vector",
        "cell/dense_i/kernel": "0->1",
        "cell/dense_h/kernel": "0->1",
        "cell/dense_h/bias": "vector",
        "norm/layer_instance/kernel": "0->1",
        "norm/layer_instance/bias": "vector",
    },
    "linen": {
        "embed/embedding": "embedding",
        "gate": None,
        "bn/scale": "vector",
        "bn/bias": "vector",
        **{f"cell/{i}{gate}/kernel": "0->1" for i in "ih" for gate in "rzn"},
        **{f"cell/{gate}/bias": "vector" for gate in ("ir", "iz", "in", "hn")},
    },
    "equinox": {
        "embed/weight": "embedding",
        "gate": None,
        "list/0/weight": "vector",
        "list/0/bias": "vector",
        "list/0/batch_counter/init": None,
        "list/1/g": "vector",
        "list/1/layer/weight": "1->0",
        "list/1/layer/bias": "vector",
        "list/2/layer/weight": "1->0",
        "list/2/layer/bias": "vector",
        "list/3/negative_slope": "vector",
        "cell/weight_ih": "1->0",
        "cell/weight_hh": "1->0",
        "cell/bias": "vector",
    },
}  # fmt: skip


@pytest.mark.parametrize("axis", [0, 1, -1])
@case
def test_a_stack_has_the_axes_of_one_layer_and_others_what_their_class_says(name, axis):
    found = texts(*CASES[name](axis))
    blocks = {}
    for path, expected in BLOCKS[name].items():
        if "->" in expected:
            count = sum(len(side) for side in expected.split("->"))
            kept = np.delete(np.arange(count + 1), axis)
            expected = "".join(x if x in "->" else str(kept[int(x)]) for x in expected)
        blocks[f"blocks/{path}"] = expected
    # Newer versions of NNX have the scales of a WeightNorm, which no class declares.
    found = {path: x for path, x in found.items() if "/scales/" not in path}
    states = {path for path in found if "index" in path}  # Equinox's running averages
    assert {found.pop(path) for path in states} <= {"vector"}
    assert found == AROUND[name] | blocks


@case
def test_as_many_heads_as_layers_leave_no_doubt(name):
    usual, alike = CASES[name](0), CASES[name](0, layers=2, heads=2)
    assert by_path(alike[0]) == by_path(usual[0])


class Square(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(4, use_bias=False)(x), None


@pytest.mark.parametrize(("axis", "kept"), [(0, (1, 2)), (1, (0, 2)), (-1, (0, 1))])
def test_a_linen_stack_is_found_whatever_the_sizes(axis, kept):
    axes = {"variable_axes": {"params": axis}, "split_rngs": {"params": True}}
    model = nn.scan(Square, length=4, **axes)()
    answers = matrix_axes(model, jax.ShapeDtypeStruct((4, 4), jnp.float32), None)
    assert answers["Dense_0"]["kernel"] == MatrixAxes(*kept)


def test_axes_of_a_model_serve_adapters_alone_that_are_beside_its_weights():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(6, 12, use_bias=False, rngs=rngs)

    tx = muon(0.1, matrix_axes=matrix_axes(Model(nnx.Rngs(0))))
    factors = {"kernel_lora_a": jnp.ones((6, 2)), "kernel_lora_b": jnp.ones((2, 12))}
    leaves = describe(tx, {"up": factors}).leaves
    assert [leaf.optimizer for leaf in leaves] == ["Muon"] * 2
    for elsewhere in ({"params": {"up": factors}}, {"down": factors}):
        with pytest.raises(ValueError, match="entries for what is no parameter"):
            tx.init(elsewhere)


def square_stacks(layers):
    """Returns stacks of one square matrix, which nothing but their number tells."""
    keys = jax.random.split(KEY, layers)
    linear = lambda key: nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(key))
    yield nnx.eval_shape(lambda: nnx.Dict(x=nnx.vmap(linear)(keys)))
    linear = lambda key: eqx.nn.Linear(4, 4, use_bias=False, key=key)
    yield {"x": eqx.filter_eval_shape(eqx.filter_vmap(linear), keys)}


def test_a_stack_that_sizes_do_not_tell_is_refused_with_the_way_on():
    for doubtful, plain in zip(square_stacks(4), square_stacks(3), strict=True):
        message = r"x/(kernel|weight) of shape \(4, 4, 4\)[^$]*other size[^$]*by hand"
        with pytest.raises(ValueError, match=message):
            matrix_axes(doubtful)
        found = next(filter(None, by_path(matrix_axes(plain)).values()))
        assert {*found.fan_in, *found.fan_out} == {1, 2}
        assert set(by_path(in_tree(doubtful)).values()) == {None}


def test_boxes_are_looked_through():
    kernel_init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    model = nn.Sequential([nn.Dense(4, kernel_init=kernel_init), nn.Dense(3)])
    answers = matrix_axes(model, jnp.ones((1, 5)))
    assert answers["layers_0"] == {"kernel": MatrixAxes(0, 1), "bias": "vector"}


class Shared(nn.Module):
    """A layer and what is added to it, in one scope."""

    layer: nn.Module

    def setup(self):
        nn.share_scope(self, self.layer)

    @nn.compact
    def __call__(self, x):
        return self.layer(x) * self.param("gain", nn.initializers.ones, (1, 4))


class Reader(nn.Module):
    """A layer of a scan that reads the variables of another by itself."""

    @nn.compact
    def __call__(self, x, _):
        layer = nn.Dense(5)
        y = layer(x)
        return y @ layer.variables["params"]["kernel"].T, None


def test_linen_modules_are_found_whatever_is_around_them():
    x = jax.ShapeDtypeStruct((2, 5), jnp.float32)
    found = {"kernel": MatrixAxes(0, 1), "bias": "vector"}
    assert matrix_axes(Shared(nn.Dense(4)), x) == found | {"gain": None}
    for _ in range(2):  # the second call must not miss what `jit` has kept
        assert matrix_axes(nn.jit(nn.Dense)(4), x) == found
    axes = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}}
    answers = matrix_axes(nn.scan(Reader, length=3, **axes)(), x, None)
    assert answers["Dense_0"]["kernel"] == MatrixAxes(0, 2)
    twice = nn.vmap(
        nn.vmap(nn.Dense, axis_size=5, in_axes=None, **axes), in_axes=0, **axes
    )
    answers = matrix_axes(twice(5), jnp.ones((5, 5)))
    assert answers["kernel"] == MatrixAxes(0, 3)


class Transposed(nn.Module):
    """A layer that sees its kernel transposed, beside one with a norm of its weight."""

    @nn.compact
    def __call__(self, x):
        turn = lambda tree: jax.tree.map(lambda x: x.T if x.ndim == 2 else x, tree)
        Dense = nn.map_variables(nn.Dense, "params", turn, turn, init=True)
        nn.WeightNorm(nn.Dense(4, name="normed"))(x[None])
        return Dense(4, name="turned")(x)


def test_variables_that_a_linen_module_sees_transposed_are_told_apart():
    model, x = Transposed(), jnp.ones(4)
    variables = filled(jax.eval_shape(model.init, KEY, x))
    answers = matrix_axes(model, x)
    assert answers["normed"]["kernel"] == MatrixAxes(0, 1)
    kernel = variables["params"]["turned"]["kernel"]
    apply = lambda x: model.apply(variables, x)
    assert_is_the_map(answers["turned"]["kernel"], kernel, apply, (4,))


# Parameters as users hold them.


def test_equinox_answers_are_the_same_for_every_form_of_the_model():
    model = eqx.filter_eval_shape(EquinoxModel)
    params = filled(eqx.filter(model, lambda x: hasattr(x, "shape")))
    params = eqx.filter(params, eqx.is_inexact_array)
    answers = by_path(matrix_axes(model))
    for form in (params, eqx.filter(model, lambda x: hasattr(x, "shape"))):
        assert by_path(matrix_axes(form)) == by_path(in_tree(form)) == answers
    tree = matrix_axes(params)
    same = jax.tree.structure(tree, is_leaf=is_answer)
    assert same == jax.tree.structure(params, is_leaf=lambda x: x is None)
    trained = jax.tree.map_with_path(
        lambda path, x: x if "up" in jax.tree_util.keystr(path) else None, params
    )
    found = {p: x for p, x in by_path(in_tree(trained)).items() if x is not None}
    assert found == {p: x for p, x in answers.items() if "up" in p and x is not None}


def test_nnx_answers_have_the_paths_of_the_parameters():
    model = nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0)))
    paths = lambda tree: [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree.leaves_with_path(tree, is_leaf=is_answer)
    ]
    answers = matrix_axes(model)
    assert type(answers) is dict
    assert paths(answers) == paths(nnx.as_pure(nnx.state(model, nnx.Param)))
    held = {p.removesuffix("/value"): x for p, x in texts_of(in_tree(model)).items()}
    assert held.items() >= texts_of(answers).items()


def texts_of(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): str(answer)
        for path, answer in jax.tree.leaves_with_path(tree, is_leaf=is_answer)
    }


def test_a_table_that_is_a_head_too_is_a_table():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Embed(6, 6, rngs=rngs)
            self.head = nnx.Linear(6, 6, use_bias=False, rngs=rngs)
            self.head.kernel = self.table.embedding
            self.twin = nnx.Dict(a=nnx.Linear(6, 6, use_bias=False, rngs=rngs))
            self.twin["b"] = self.twin["a"]

    model = nnx.eval_shape(lambda: Tied(nnx.Rngs(0)))
    answers = list(by_path(matrix_axes(model)).values())
    assert answers == ["embedding", MatrixAxes(0, 1)]


def test_parameters_without_modules_tell_nothing():
    trees = [
        {"kernel": jnp.ones((2, 3))},
        nnx.state(nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))),
        [None, 1, "text", object(), jax.random.key(0)],
        {},
        None,
        jnp.ones(3),
    ]
    assert [in_tree(tree) for tree in trees] == [None] * len(trees)


def test_other_models_are_refused_with_what_is_accepted():
    with pytest.raises(TypeError, match=r"NNX[^$]*linen[^$]*got dict[^$]*MatrixAxes"):
        matrix_axes({"kernel": jnp.ones((2, 3))})
    with pytest.raises(TypeError, match=r"`matrix_axes\(module, \*inputs\)`"):
        matrix_axes(nn.Dense(3))
    with pytest.raises(TypeError, match=r"only a Flax linen module needs inputs"):
        matrix_axes(eqx.filter_eval_shape(lambda: eqx.nn.Linear(2, 3, key=KEY)), 1)


# What is asked for as a batch.


def test_gates_are_matrices_of_their_own_on_request():
    cell = filled(eqx.filter_eval_shape(lambda: eqx.nn.LSTMCell(3, 5, key=KEY)))
    for name in ("weight_ih", "weight_hh"):
        weight = getattr(cell, name)
        seen = view(getattr(matrix_axes(cell, split=True), name), weight)
        gates = [gate.T for gate in jnp.split(weight, 4)]  # as its `__call__` does
        np.testing.assert_array_equal(seen, jnp.stack(gates))
        assert view(getattr(matrix_axes(cell), name), weight).ndim == 2
    for kind, gates in ((nnx.OptimizedLSTMCell, 4), (nnx.GRUCell, 3)):
        cell = nnx.eval_shape(lambda kind=kind: kind(3, 5, rngs=nnx.Rngs(0)))
        axes = matrix_axes(cell, split=True)["dense_i"]["kernel"]
        assert axes == MatrixAxes(0, 1, split={1: gates})


def test_named_kernels_are_split_on_request():
    make = lambda r: nnx.Dict(
        qkv=nnx.Linear(4, 24, rngs=r), up=nnx.LinearGeneral(4, (2, 6), rngs=r)
    )
    model = nnx_filled(lambda: make(nnx.Rngs(0)))
    axes = matrix_axes(model, split={"*qkv/kernel": 3, "up/*": 2})
    kernel = model["qkv"].kernel[...]
    seen = view(axes["qkv"]["kernel"], kernel)
    np.testing.assert_array_equal(seen, jnp.stack(jnp.split(kernel, 3, axis=1)))
    kernel = model["up"].kernel[...]
    np.testing.assert_array_equal(
        view(axes["up"]["kernel"], kernel), jnp.moveaxis(kernel, 1, 0)
    )
    model = filled(eqx.filter_eval_shape(lambda: [eqx.nn.Linear(4, 6, key=KEY)]))
    (axes,) = matrix_axes(model, split={"0/weight": 2})
    assert axes.weight == MatrixAxes(1, 0, split={0: 2})


@case
def test_heads_are_matrices_of_their_own_on_request(name):
    if name == "equinox":
        module = eqx.filter_eval_shape(eqx.nn.MultiheadAttention, 2, 8, key=KEY)
        axes, params = matrix_axes(module, per_head=True), filled(module)
        query, out = axes.query_proj.weight, axes.output_proj.weight
        kernels = params.query_proj.weight, params.output_proj.weight
        heads = jnp.split(kernels[0].T, 2, axis=1), jnp.split(kernels[1].T, 2)
    else:
        if name == "nnx":
            module = nnx_filled(lambda: nnx_attention(nnx.Rngs(0)))
            params = nnx.as_pure(nnx.state(module, nnx.Param))
            axes = matrix_axes(module, per_head=True)
        else:
            module = nn.MultiHeadDotProductAttention(2)
            axes = matrix_axes(module, jnp.ones((1, 2, 8)), per_head=True)
            params = jax.eval_shape(module.init, KEY, jnp.ones((1, 2, 8)))["params"]
            params = filled(params)
        query, out = axes["query"]["kernel"], axes["out"]["kernel"]
        kernels = params["query"]["kernel"], params["out"]["kernel"]
        heads = kernels[0].swapaxes(0, 1), kernels[1]
    np.testing.assert_array_equal(view(query, kernels[0]), heads[0])
    np.testing.assert_array_equal(view(out, kernels[1]), heads[1])


def test_a_request_that_meets_no_kernel_is_refused():
    linear = nnx.eval_shape(lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    for request, message in (
        ({"split": True}, "split=True fits no matrix"),
        ({"per_head": True}, "per_head=True fits no matrix"),
        (
            {"split": {"*/qkv/kernel": 3}},
            r"qkv/kernel fits no matrix[^$]*paths: kernel",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            matrix_axes(linear, **request)


# Frameworks that are no dependency of the tests.


def test_haliax_names_say_what_its_axes_are():
    hax = pytest.importorskip("haliax")
    D, H, K, L = (hax.Axis(*axis) for axis in (("D", 8), ("H", 2), ("K", 8), ("L", 2)))
    stack = hax.nn.Stacked.init(L, hax.nn.Linear)
    make = lambda **kw: stack(key=jax.random.split(KEY, 2), **kw).stacked
    axes = lambda **kw: matrix_axes(make(**kw)).weight.array
    assert axes(In=D, Out=(H, K)) == MatrixAxes(3, (1, 2))
    assert axes(In=(H, K), Out=D, out_first=False) == MatrixAxes((1, 2), 3)
    assert matrix_axes(make(In=D, Out=(H, K))).bias.array == "vector"
    assert in_tree({"a": hax.nn.LayerNorm.init(D)})["a"].weight.array == "vector"
    table = hax.nn.Embedding.init(D, K, key=KEY)
    assert matrix_axes(table).weight.array == "embedding"


@jax.numpy_rank_promotion("allow")
def test_keras_layers_say_what_the_axes_of_their_variables_are(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    layers = keras.layers
    model = keras.Sequential([
        layers.Embedding(16, 8),
        layers.Bidirectional(layers.LSTM(4, return_sequences=True)),
        layers.Conv1DTranspose(6, 3),
        layers.LayerNormalization(),
    ])  # fmt: skip
    model.build((None, 5))
    answers = matrix_axes(model, split=True)
    cell = [MatrixAxes(0, 1, split={1: 4}), MatrixAxes(0, 1, split={1: 4}), "vector"]
    transpose = [MatrixAxes((0, 2), 1), "vector"]
    assert answers == ["embedding", *cell, *cell, *transpose, "vector", "vector"]

    attention = layers.MultiHeadAttention(2, 4)
    attention(np.ones((1, 3, 8)), np.ones((1, 3, 8)))
    projection, out = MatrixAxes(0, (1, 2)), MatrixAxes((0, 1), 2)
    assert matrix_axes(attention)[::2] == [projection] * 3 + [out]
    assert matrix_axes(attention)[1::2] == ["vector"] * 4
    heads = matrix_axes(attention, per_head=True)
    assert heads[::2] == [MatrixAxes(0, 2)] * 3 + [MatrixAxes(1, 2)]
