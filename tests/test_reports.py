"""Kinds of use that people report faults of: right, or refused in words."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import helpers
import nanochat_jax as nj
from nanochat_jax.transforms.clip import clip_by_global_norm
from nanochat_jax.transforms.precision import in_float32, widened
from nanochat_jax.transforms.state_paths import locate

every = pytest.mark.parametrize("name", helpers.TRANSFORMS)


class Fields(NamedTuple):
    """Parameters with the names of fields, in the order of the alphabet."""

    count: Any
    momentum: Any
    mu: Any
    nu: Any
    projector: Any


def named(wrap):
    """The same arrays in a container of that kind, one of them nested in itself."""
    tall, stack, small = (helpers.params()[x] for x in ("tall", "stack", "small"))
    nested = wrap(small, tall, tall, small, stack)
    return wrap(tall, stack, nested, tall, small)


def as_dict(*leaves):
    return dict(zip("abcde", leaves, strict=True))


def leaf_types(tree):
    return [(x.shape, x.dtype.name) for x in jax.tree.leaves(tree)]


@every
def test_parameters_may_be_named_as_fields_of_the_state(name):
    found = []
    for wrap in (Fields, as_dict):
        params = named(wrap)
        tx = helpers.make(name, params)
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        found.append(list(map(leaf_types, (state, updates, after))))
    assert found[0] == found[1]


def test_moments_of_parameters_named_as_fields_are_stored_each_by_its_own_codec():
    codecs = {"mu": nj.Int8(16), "nu": nj.Dynamic8(16, signed=False, zero=False)}
    tx = nj.sequence(
        helpers.quantized(optax.scale_by_adam(), codecs), max_bytes=1, core_ndim=1
    )
    results = []
    for wrap in (Fields, as_dict):
        params, update = named(wrap), jax.jit(tx.update)
        updates, state = update(params, tx.init(params), params)
        results.append(jax.tree.leaves((updates, update(params, state, params))))
    chex.assert_trees_all_equal(*results)


def test_a_leaf_of_the_state_belongs_to_the_parameter_of_the_whole_path():
    params = named(Fields)
    names = [
        jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)
    ]
    labels = Fields("a", "b", Fields(*"abaab"), "b", "a")
    adam = optax.adam(optax.constant_schedule(0.1))
    parts = optax.partition({"a": adam, "b": nj.momentum()}, labels)
    for tx in (adam, optax.MultiSteps(adam, 2), parts):
        state = tx.init(params)
        places = locate(state, params)
        assert {place.name for place in places.values()} == {None, *names}
        counts = [
            key for key, place in places.items() if place.fields[-1:] == ["count"]
        ]
        assert {places[key].name for key in counts} == {None}
        shapes = dict(
            zip(names, (x.shape for x in jax.tree.leaves(params)), strict=True)
        )
        for path, x in jax.tree.leaves_with_path(state):
            name = places[jax.tree_util.keystr(path)].name
            assert x.shape == shapes.get(name, ())


def test_a_parameter_that_is_the_whole_tree_owns_moments_and_no_counts():
    state = optax.adam(optax.constant_schedule(0.1)).init(jnp.ones((8, 16)))
    owned = {
        key for key, place in locate(state, state[0].mu).items() if place.name == ""
    }
    assert owned == {"[0].mu", "[0].nu"}


@jax.tree_util.register_pytree_with_keys_class
class Elementwise:
    """A node that compares entry by entry, as arrays do."""

    def __init__(self, array):
        self.array = array

    def __eq__(self, other):
        raise TypeError("the truth of a comparison of entries is ambiguous")

    __hash__ = None

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey("array"), self.array)], None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


def wrapped_in_nodes(tree):
    return jax.tree.map(Elementwise, tree)


@every
def test_nodes_of_a_tree_may_compare_entry_by_entry(name):
    params = wrapped_in_nodes(helpers.params())
    tx = helpers.make(name, params)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert leaf_types(updates) == leaf_types(params)
    assert leaf_types(after) == leaf_types(state)


EMPTY = {"a": (0, 8), "b": (0, 8, 8), "c": (8, 0), "d": (2, 0, 8)}


@every
def test_leaves_without_entries_pass_through(name):
    empty = jax.tree.map(jnp.zeros, EMPTY, is_leaf=lambda x: type(x) is tuple)
    for params in (empty, empty | helpers.params()):
        tx = helpers.make(name, params)
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert leaf_types(updates) == leaf_types(params)
        assert leaf_types(after) == leaf_types(state)


def test_the_norm_of_float16_gradients_is_taken_in_float32():
    grads = helpers.gradients(0)
    ours, theirs = clip_by_global_norm, optax.clip_by_global_norm
    for max_norm in (0.5, 1e3):
        clip = lambda make, x, max_norm=max_norm: make(max_norm).update(x, None)[0]
        chex.assert_trees_all_equal(clip(ours, grads), clip(theirs, grads))
        large = jax.tree.map(lambda x: (200 * x).astype(jnp.float16), grads)
        clipped = clip(ours, large)
        assert leaf_types(clipped) == leaf_types(large)
        exact = clip(theirs, optax.tree.cast(large, jnp.float32))
        helpers.assert_close(optax.tree.cast(clipped, jnp.float32), exact, rtol=1e-3)


# Links of a plain chain return the type they are given; wrappers run on float32.
SHORT = {
    "in_float32(adam)": lambda: in_float32(optax.scale_by_adam()),
    "int8(adam.mu)": helpers.TRANSFORMS["int8(adam.mu)"],
    "int8(galore(muon))": helpers.TRANSFORMS["int8(galore(muon))"],
}


@pytest.mark.parametrize("name", SHORT)
def test_float16_gradients_are_cast_once_at_the_end(name):
    """So that what is under the least float16 is not lost between two links."""
    tx, dtype = SHORT[name](), "float16"
    grads = optax.tree.scale(1e-5, helpers.gradients(0)) | {"small": jnp.zeros((2, 3))}
    grads = optax.tree.cast(grads, dtype)
    wide = optax.tree.cast(grads, jnp.float32)
    state = tx.init(wide)
    update = jax.jit(tx.update)
    updates, after = update(grads, state, wide)
    expected, exact = update(wide, state, wide)
    assert leaf_types(updates) == leaf_types(grads)
    chex.assert_trees_all_equal(after, exact)
    chex.assert_trees_all_equal(updates, optax.tree.cast(expected, dtype))


@every
def test_no_two_leaves_of_a_state_share_a_buffer(name):
    """Or else the state cannot be donated."""
    state = helpers.TRANSFORMS[name]().init(helpers.params())
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(places)) == len(places)


def stable(name, dtype):
    """Types that are not those of the parameters, or change with an update."""
    params = helpers.params(dtype)
    tx = helpers.make(name, params)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    like = helpers.like_updates(name, params)
    if name.startswith("built"):  # for these parameters, with rounding for short ones
        like = jax.eval_shape(widened, params)
    assert leaf_types(updates) == leaf_types(like)
    assert leaf_types(after) == leaf_types(state)
    return {x.dtype.name for x in jax.tree.leaves(state)}


@every
def test_64_bit_types_in_the_process_make_none_in_the_state(name):
    with jax.enable_x64(True):
        found = stable(name, jnp.float32) | stable(name, jnp.bfloat16)
    assert not [dtype for dtype in found if "64" in dtype]


@pytest.mark.slow
def test_64_bit_types_in_the_process_change_no_update():
    name = "int8, 2 bits(two speeds)"
    expected, _ = helpers.run(name, 1)
    tx, params = helpers.TRANSFORMS[name](), helpers.params()
    with jax.enable_x64(True):
        update = jax.jit(tx.update)
        updates, _ = update(helpers.gradients(0), tx.init(params), params)
    helpers.assert_close(updates, expected, atol=1e-4)


@every
def test_types_are_promoted_by_nobody(name):
    if "adam" in name or "built" in name:
        pytest.skip("Optax's Adam raises a float to an integer power")
    with jax.numpy_dtype_promotion("strict"):
        stable(name, jnp.float32)
        stable(name, jnp.bfloat16)


@pytest.mark.parametrize(
    "name",
    [
        "galore(muon)",
        pytest.param("int8, 2 bits(two speeds)", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_zeros_make_no_nan_anywhere(name):
    """Each operation is looked at, by itself."""
    params = {"stack": helpers.params()["stack"]}
    tx = helpers.TRANSFORMS[name]()
    zero = optax.tree.zeros_like(params)
    with jax.debug_nans(True), jax.disable_jit():
        clipped, _ = clip_by_global_norm(1.0).update(zero, None)
        updates, _ = tx.update(clipped, tx.init(params), params)
    chex.assert_trees_all_equal(updates, zero)


@every
@pytest.mark.parametrize("varying", ["gradients", "everything"])
def test_updates_may_vary_over_a_mesh_within_shard_map(name, varying):
    """`jax.shard_map` checks what its results vary over, unless told not to."""
    params = helpers.params()
    tx = helpers.make(name, params)
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    vary = lambda tree: jax.tree.map(
        lambda x: jax.lax.pcast(x, "data", to="varying"), tree
    )

    def update(grads, state, params):
        if varying == "everything":
            state, params = vary(state), vary(params)
        results = tx.update(vary(grads), state, params)
        return jax.tree.map(lambda x: x[None], results)

    mapped = jax.shard_map(update, mesh=mesh, in_specs=jax.P(), out_specs=jax.P("data"))
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(mapped, params, state, params)
    first = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree
    )
    assert leaf_types(first(updates)) == leaf_types(params)
    assert leaf_types(first(after)) == leaf_types(state)


@every
def test_a_pickled_transform_works_afterwards(name):
    cloudpickle = pytest.importorskip("cloudpickle", reason="cloudpickle is missing")
    params = helpers.params()
    tx = helpers.make(name, params)
    again = cloudpickle.loads(cloudpickle.dumps(tx))
    state = jax.eval_shape(again.init, params)
    assert leaf_types(state) == leaf_types(jax.eval_shape(tx.init, params))
    updates, after = jax.eval_shape(again.update, params, state, params)
    assert leaf_types(updates) == leaf_types(params)
    assert leaf_types(after) == leaf_types(state)


@every
def test_integer_gradients_give_updates_that_are_not_cut_to_integers(name):
    params = helpers.params()
    tx = helpers.make(name, params)
    grads = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "int32"), params)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, grads, state, params)
    assert leaf_types(updates) == leaf_types(params)
    assert leaf_types(after) == leaf_types(state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nj.galore(nj.momentum(), 2),
        lambda: nj.quantize_state(nj.momentum(), helpers.INT8),
        nj.orthogonalize,
    ],
)
def test_complex_leaves_are_refused_with_their_paths(make):
    params = {"a": {"w": jnp.ones((8, 16), jnp.complex64)}, "b": jnp.ones((8, 16))}
    message = r"\['a'\]\['w'\] is complex64\n(.|\n)*split_real_and_imaginary"
    tx = make()
    run = lambda: tx.update(params, tx.init(params), params)
    with pytest.raises(TypeError, match=message):
        run()


CODECS = [
    nj.Int8(16), nj.Int4(16), nj.Dynamic8(16),
    nj.Normal4(16), nj.Normal2(16), nj.Int8(16, scale_dtype="bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("exponent", [-100, -83, 99, 115])
def test_the_scale_of_a_block_changes_no_code(codec, exponent):
    """Over what a scale in float32 can hold: from 1e-30 to 4e34."""
    x = jax.random.normal(jax.random.key(0), (3, 40))
    stored = codec.encode(x)
    scaled = codec.encode(x * 2.0**exponent)
    chex.assert_trees_all_equal(scaled.codes, stored.codes)
    helpers.assert_close(scaled.decode() * 2.0**-exponent, stored.decode())


@pytest.mark.parametrize("make", [optax.adamw, optax.lamb])
def test_an_inner_transform_that_needs_parameters_is_refused_with_another_way(make):
    needing = make(0.1, weight_decay=0.1)
    for argument, tx in (
        ("inner", helpers.low_rank(needing)),
        ("complement", helpers.low_rank(nj.momentum(), complement=needing)),
    ):
        params = helpers.params()
        state = jax.eval_shape(tx.init, params)
        message = f"`{argument}` of `galore` needs(.|\n)*optax.add_decayed_weights"
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(tx.update, params, state, params)


@pytest.mark.parametrize("inner", [optax.identity, optax.scale_by_rms])
def test_a_complement_may_stand_beside_an_inner_transform_without_first_moments(inner):
    tx = helpers.low_rank(inner(), complement=nj.momentum())
    params = helpers.params()
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert leaf_types(updates) == leaf_types(params)
    assert leaf_types(after) == leaf_types(state)


@pytest.mark.parametrize(
    ("name", "who"),
    [
        ("galore(muon)", "galore"),
        ("int8(momentum)", "quantize_state"),
        ("sequence(int8(joint))", "quantize_state"),
    ],
)
def test_a_state_of_plain_dicts_is_refused_with_the_way_to_restore_it(name, who):
    """As Orbax has it when it is not told what to restore into."""
    params, tx = helpers.params(), helpers.TRANSFORMS[name]()

    def plain(node):
        if isinstance(node, tuple) and hasattr(node, "_asdict"):
            node = node._asdict()
        if isinstance(node, dict):
            return {key: plain(x) for key, x in node.items()}
        return [plain(x) for x in node] if isinstance(node, tuple) else node

    state = plain(jax.eval_shape(tx.init, params))
    message = f"`{who}` needs a .*State(.|\n)*got a dict(.|\n)*StandardCheckpointer"
    with pytest.raises(TypeError, match=message):
        jax.eval_shape(tx.update, params, state, params)
