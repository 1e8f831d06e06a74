"""A quantised state has a plain view, which is a state of the plain transform."""

import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
import nanochat_jax as nj
from nanochat_jax.codecs import Quantized
from nanochat_jax.transforms import MomentumState

SECOND_MOMENT = nj.Dynamic8(16, signed=False, zero=False)
ADAM = {"mu": nj.Int8(16), "nu": SECOND_MOMENT}
CODECS = [nj.Int8(16), nj.Int4(16), nj.Dynamic8(16), nj.Normal4(16)]


def as_is(inner, codecs):
    del codecs
    return inner


# Each is built with `quantize_state`, or with `as_is` in its place.
BUILDERS = {
    "momentum": lambda wrap: wrap(nj.momentum(), helpers.INT8),
    "adam": lambda wrap: wrap(optax.adamw(0.1), ADAM),
    "adam with a bfloat16 moment": lambda wrap: wrap(
        optax.scale_by_adam(mu_dtype=jnp.bfloat16), {"mu": nj.Int8(16)}
    ),
    "around galore": lambda wrap: wrap(
        helpers.low_rank(nj.momentum()), {"momentum": nj.Int8(), "basis": nj.Int4()}
    ),
    "inside galore": lambda wrap: helpers.low_rank(
        wrap(nj.momentum(), helpers.INT8), reproject=()
    ),
    "in two places": lambda wrap: optax.partition(
        {
            "a": nj.sequence(wrap(nj.momentum(), {"momentum": nj.Int4(16)})),
            "b": optax.chain(optax.clip(1.0), wrap(optax.scale_by_adam(), ADAM)),
        },
        {"tall": "a", "stack": "b", "small": "b", "nested": "a", "absent": "b"},
    ),
    "one in another": lambda wrap: wrap(
        wrap(optax.scale_by_adam(), {"mu": nj.Int8(16)}), {"nu": SECOND_MOMENT}
    ),
    "nothing stored": lambda wrap: nj.momentum(),
}  # fmt: skip


@pytest.fixture(scope="module", params=BUILDERS)
def case(request):
    """A quantised transform, the plain one, and a state of the first."""
    make = BUILDERS[request.param]
    tx, plain = make(helpers.quantized), make(as_is)
    state, update = tx.init(helpers.params()), jax.jit(tx.update)
    for step in range(2):
        _, state = update(helpers.gradients(step), state, helpers.params())
    return tx, plain, state


def test_the_plain_view_is_a_state_of_the_plain_transform(case):
    _, plain, state = case
    view = nj.dequantize(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(view, plain.init(helpers.params()))


def test_the_plain_transform_goes_on_from_the_plain_view(case):
    """With the very updates, since a quantised transform runs on what it decodes."""
    tx, plain, state = case
    inputs = helpers.gradients(2), state, helpers.params()
    view = nj.dequantize(state)
    updates, _ = jax.jit(tx.update)(*inputs)
    expected, _ = jax.jit(plain.update)(inputs[0], view, inputs[2])
    # A moment that is bfloat16 when plain is float32 under `quantize_state`.
    short = any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(view))
    helpers.assert_close(updates, expected, atol=0.01 if short else 1e-6)


def test_what_was_decoded_is_stored_in_the_same_codes(case):
    tx, _, state = case
    like = jax.eval_shape(tx.init, helpers.params())
    move = lambda state: nj.quantize(like, nj.dequantize(state), 2)
    again = jax.jit(move)(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(again, state)
    codes = lambda tree: [
        node.codes
        for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Quantized))
        if isinstance(node, Quantized)
    ]
    chex.assert_trees_all_equal(codes(again), codes(state))
    close = lambda x, y: np.testing.assert_allclose(
        np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-6
    )
    jax.tree.map(close, again, state)  # counts too


def test_after_one_step_the_plain_view_is_within_the_error_of_the_codec():
    for codec, largest in zip(CODECS, (0.01, 0.12, 0.03, 0.1), strict=True):
        inner = nj.momentum()
        tx = helpers.quantized(inner, {"momentum": codec})
        init = lambda tx: tx.init(helpers.params())
        _, state = tx.update(helpers.gradients(0), init(tx))
        _, reference = inner.update(helpers.gradients(0), init(inner))
        errors = nj.quantization_error(state, reference)
        assert set(errors) == {
            ".momentum['tall']", ".momentum['stack']", ".momentum['small']",
            ".momentum['nested'].momentum['tall']", ".momentum['nested'].nu",
        }  # fmt: skip
        assert 0 < errors[".momentum['stack']"].relative < largest, codec


def test_the_error_is_that_of_the_definition():
    tx = helpers.quantized(nj.momentum(), {"momentum": nj.Int4(4)})
    reference = {"w": jnp.asarray([[7.0, 0.4, 0.0, -3.2], [0.0, 0.0, 0.0, 0.0]])}
    stored = {"w": np.asarray([[7.0, 0.0, 0.0, -3.0], [0.0, 0.0, 0.0, 0.0]])}
    reference = MomentumState(reference)
    state = nj.quantize(tx.init(reference.momentum), reference)
    [(path, error)] = nj.quantization_error(state, reference).items()
    assert path == ".momentum['w']"
    difference = np.linalg.norm(stored["w"] - reference.momentum["w"])
    size = np.linalg.norm(reference.momentum["w"])
    assert error.relative == pytest.approx(difference / size, rel=1e-6)
    assert error.zeros == 1 / 8
    zero = jax.tree.map(jnp.zeros_like, reference)
    with jax.debug_nans(True):
        [error] = nj.quantization_error(tx.init(zero.momentum), zero).values()
    assert error == (0, 0)


def test_linear_levels_lose_small_entries_that_a_dynamic_map_keeps():
    """The zeros that Newton-Schulz would feel: columns of one scale among others."""
    x = jax.random.normal(jax.random.key(0), (64, 128))
    x = {"w": x.at[:, ::16].multiply(300.0)}
    reference = MomentumState(x)
    error = {}
    for codec in (nj.Int8(), nj.Dynamic8()):
        tx = nj.quantize_state(nj.momentum(), {"momentum": codec})
        state = nj.quantize(tx.init(x), reference)
        [error[codec.name]] = nj.quantization_error(state, reference).values()
    assert error["int8"].zeros > 0.5
    assert error["dynamic8"].zeros < 0.01


def test_a_built_optimizer_is_seen_through():
    """In 4 bits too, where an odd last axis is not to be read off the codes."""
    params = {"up": jnp.zeros((16, 33)), "embed": {"embedding": jnp.zeros((40, 16))}}
    build = lambda **kwargs: nj.build_optimizer(
        nj.OptimizerConfig(quant_min_size=0, weight_decay=0.1, **kwargs), params
    )
    tx, plain = build(use_8bit_optim=True, quant_bits=4), build()
    grads = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(0), x.shape), params
    )
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    expected, reference = jax.jit(plain.update)(grads, plain.init(params), params)
    # Only the stored copies are rounded.
    helpers.assert_close(updates, expected, atol=1e-6)
    errors = nj.quantization_error(state, reference)
    ends = ("momentum['up']", "mu['embed']['embedding']", "nu['embed']['embedding']")
    assert all(any(path.endswith(end) for path in errors) for end in ends)
    assert len(errors) == 3
    assert all(0 < error.relative < 0.15 for error in errors.values())
    assert all(
        error.zeros == 0 for path, error in errors.items() if path.endswith(ends[2])
    )


def test_a_state_of_another_transform_is_refused_with_what_differs():
    tx, plain = helpers.quantized(nj.momentum(), helpers.INT8), nj.momentum()
    w = {"w": jnp.zeros((8, 32))}
    for call, lacks in (
        (lambda: nj.quantize(tx.init(w), tx.init(w)), "momentum"),
        (lambda: nj.quantization_error(tx.init(w), tx.init(w)), "momentum"),
        (lambda: nj.quantize(tx.init(w), plain.init(w | {"v": w["w"]})), "besides"),
    ):
        with pytest.raises(ValueError, match=f"is not the plain form.*{lacks}"):
            call()


def test_arrays_are_paired_by_path_whatever_the_order_of_keys():
    tx = helpers.quantized(nj.momentum(), helpers.INT8)
    in_order = collections.OrderedDict(k=jnp.ones((8, 32)), j=jnp.full((8, 32), 2.0))
    plain = MomentumState(in_order)
    state = nj.quantize(tx.init(dict(in_order)), plain)
    for name, x in in_order.items():
        helpers.assert_close(nj.dequantize(state).momentum[name], x)
    errors = nj.quantization_error(state, plain)
    assert all(error.relative == 0 for error in errors.values())


def test_arrays_of_other_shapes_are_refused_and_types_are_those_of_the_state():
    tx = helpers.quantized(nj.momentum(), helpers.INT8)
    state = tx.init({"w": jnp.ones((8, 32)), "v": jnp.ones((4, 16))})
    other = MomentumState({"w": jnp.ones((4, 64)), "v": jnp.ones((1,))})
    for call in (nj.quantize, nj.quantization_error):
        with pytest.raises(ValueError, match=r"v'\] has shape \(1,\)(.|\n)*w'\] has"):
            call(state, other)
    tx = helpers.quantized(
        optax.scale_by_adam(mu_dtype=jnp.bfloat16), {"nu": nj.Int8()}
    )
    like = tx.init({"w": jnp.ones((8, 32))})
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), nj.dequantize(like))
    chex.assert_trees_all_equal_shapes_and_dtypes(nj.quantize(like, wide), like)


def test_an_init_that_was_compiled_before_is_seen_through_and_stays_as_it_was():
    inner = helpers.quantized(nj.momentum(), helpers.INT8)
    tx = optax.GradientTransformation(jax.jit(inner.init), inner.update)
    params = {"w": jnp.ones((8, 32))}
    state = tx.init(params)
    view = nj.dequantize(state)
    chex.assert_trees_all_equal(view, nj.momentum().init(params))
    chex.assert_trees_all_equal(tx.init(params), state)
