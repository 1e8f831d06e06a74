"""An update in the backward pass is the ordinary update, a layer at a time."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
import nanochat_jax as nj
from nanochat_jax.optimizer.backward.layout import layout_of
from nanochat_jax.optimizer.backward.stacked import Stacked

WIDTH, HIDDEN, VOCABULARY, LENGTH = 16, 24, 20, 8


def make_params(layers=4, tied=False, width=WIDTH, hidden=HIDDEN):
    """A stack of blocks with two matrices and a vector, an embedding, and a head."""
    shapes = {
        "blocks": {
            "up": (layers, width, hidden),
            "down": (layers, width, hidden),
            "scale": (layers, width),
        },
        "embed": (VOCABULARY, width),
    } | ({} if tied else {"head": (width, VOCABULARY)})
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: type(x) is tuple)
    draw = lambda i, shape: jax.random.normal(jax.random.key(i), shape) / 4
    return treedef.unflatten(draw(*pair) for pair in enumerate(leaves))


def embed(rest, batch):
    return rest["embed"][batch[:, :-1]]


def block(layer, x):
    size = jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-3)
    normed = jnp.einsum("bsd,d->bsd", x * size, 1 + layer["scale"])
    hidden = normed @ layer["up"]
    return x + jax.nn.silu(hidden) @ layer["down"].T


def head(rest, x, batch):
    logits = x @ (rest["head"] if "head" in rest else rest["embed"].T)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return losses.mean()


MODEL = (embed, block, head)


def loss_of(params, batch):
    rest = {key: x for key, x in params.items() if key != "blocks"}
    go = lambda x, layer: (block(layer, x), None)
    x, _ = jax.lax.scan(go, embed(rest, batch), params["blocks"])
    return head(rest, x, batch)


def ordinary(tx):
    """The step that takes the mean gradient over microbatches, then one update."""

    def step(params, state, batch):
        evaluate = lambda part: jax.value_and_grad(loss_of)(params, part)
        found = jax.lax.map(evaluate, batch)
        loss, grads = jax.tree.map(lambda x: x.mean(0, dtype=x.dtype), found)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, (loss, optax.tree.norm(grads))

    return jax.jit(step)


def draw(step, microbatches=1):
    shape = (microbatches, 4 // microbatches, LENGTH + 1)
    return jax.random.randint(jax.random.key(step), shape, 0, VOCABULARY)


def axes(path, shape):
    del path
    return nj.MatrixAxes(fan_in=-2, fan_out=-1) if len(shape) > 2 else None


def kinds(params):
    """The role of every parameter."""
    blocks = {"up": "matrix", "down": "matrix", "scale": "vector"}
    known = {"blocks": blocks, "embed": "embedding", "head": "head"}
    return {key: known[key] for key in params}


def built(params, **kwargs):
    """An optimizer whose updates are the same in any order of work, but for rounding.

    GaLore changes bases on steps 0 and 3, the one that is compared.
    """
    config = nj.OptimizerConfig(
        lr=0.005, grad_clip=0.0, ns_dtype="float32", ns_steps=2, galore_rank=4,
        galore_update_freq=3, quant_min_size=1, **kwargs,
    )  # fmt: skip
    return nj.build_optimizer(config, params, matrix_axes=axes, labels=kinds(params))


def called(params):
    return nj.muon(
        0.005, bits=8, min_size=1, ns_dtype="float32", matrix_axes=axes,
        labels=kinds(params),
    )  # fmt: skip


BITS = {"use_8bit_optim": True}
LOW_RANK = {"use_galore": True}
CHANCE = {"quant_bits": 4, "stochastic_rounding": True}
OPTIMIZERS = {
    "4 bits, by chance": functools.partial(built, **BITS, **CHANCE),
    "both, rest in 2 bits": functools.partial(
        built, **LOW_RANK, **BITS, galore_rest_bits=2
    ),
    "adamw": lambda params: optax.adamw(0.005, weight_decay=0.1),
    "muon": built,
    "8 bits": functools.partial(built, **BITS),
    "galore": functools.partial(built, **LOW_RANK, galore_residual=0.0),
    "galore, complement": functools.partial(built, **LOW_RANK),
    "both": functools.partial(built, **LOW_RANK, **BITS, weight_decay=0.1),
    "muon()": called,
}
# Whether weights are tied, layers of a segment, and microbatches.
WAYS = [(False, 2, 1), (True, 1, 2), (True, 2, 2), (False, 1, 1)]
CASES = [
    pytest.param(name, *way, marks=pytest.mark.slow if i > 2 else (), id=name)
    for i, (name, way) in enumerate(zip(OPTIMIZERS, itertools.cycle(WAYS)))
]
BY_CASE = pytest.mark.parametrize(("name", "tied", "segment", "microbatches"), CASES)


@functools.cache
def steps_of(name, tied, segment, microbatches):
    """Parameters, the state of an optimizer, and both kinds of step."""
    params = make_params(tied=tied)
    tx = OPTIMIZERS[name](params)
    init, step = nj.update_in_backward(*MODEL, tx, segment=segment, microbatches=True)
    return params, init(params), ordinary(tx), jax.jit(step)


def assert_same_update(new, expected, before):
    """Holds updates to 1e-6 of their largest entry, and the last digits of weights."""
    for a, b, p in zip(*map(jax.tree.leaves, (new, expected, before)), strict=True):
        a, b, p = (np.asarray(x, np.float64) for x in (a, b, p))
        digit = np.spacing(np.abs(p).max(), dtype=np.float32)
        assert np.abs(a - b).max() <= 1e-6 * np.abs(b - p).max() + 2 * digit


def assert_same_state(new, expected):
    """Holds codes equal but for ties, other numbers but for rounding."""
    chex.assert_trees_all_equal_shapes_and_dtypes(new, expected)
    assert jax.tree.structure(new) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (new, expected)), strict=True):
        off = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
        if jnp.issubdtype(a.dtype, jnp.integer):
            assert off.max() <= 1 and (off > 0).mean() < 0.01
        else:
            assert off.max() <= 1e-5 * max(np.abs(b).max(), 1e-3)


@BY_CASE
def test_a_step_is_the_ordinary_step(name, tied, segment, microbatches):
    params, state, usual, backward = steps_of(name, tied, segment, microbatches)
    for step in range(3):
        params, state, _ = usual(params, state, draw(step, microbatches))
    batch = draw(3, microbatches)
    expected, expected_state, (loss, norm) = usual(params, state, batch)
    new, new_state, report = backward(params, state, batch)
    assert_same_update(new, expected, params)
    assert_same_state(new_state, expected_state)
    np.testing.assert_allclose(report.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(report.grad_norm, norm, rtol=1e-6)
    assert int(report.left_out) == 0


@BY_CASE
def test_runs_of_either_step_and_of_both_in_turn_have_the_same_losses(
    name, tied, segment, microbatches
):
    params, state, usual, backward = steps_of(name, tied, segment, microbatches)

    def losses(steps):
        run, found = (params, state), []
        for i, step in zip(range(20), itertools.cycle(steps), strict=False):
            *run, report = step(*run, draw(i, microbatches))
            found.append(float(report[0]))
        return found

    expected = losses([usual])
    # One code of so few bits, rounded to the other side of a tie, moves a small model.
    atol = 5e-3 if "bits" in name else 1e-4
    np.testing.assert_allclose(losses([backward]), expected, atol=atol)
    np.testing.assert_allclose(losses([usual, backward]), expected, atol=atol)


def run_once(tx, model=MODEL, params=None, **kwargs):
    """Returns parameters and state before a step, and what the step returns."""
    params = make_params() if params is None else params
    init, step = nj.update_in_backward(*model, tx, **kwargs)
    state = init(params)
    return params, state, *jax.jit(step)(params, state, draw(0)[0])


def stored_momentum():
    """A state with codes and scales of every layer, and a count."""
    inner = helpers.quantized(nj.momentum(), helpers.STOCHASTIC)
    return optax.chain(inner, optax.scale(-0.1))


@functools.cache
def trapped():
    """A model whose layers have gradients that are not finite if a trap is zero.

    Either those of their own weights alone, or of their hidden states too.
    """

    def spoilt_block(layer, x):
        own, through = (jnp.broadcast_to(t, x.shape) for t in layer["traps"])
        return block(layer, x) + jnp.sqrt(own) + jnp.sqrt(jnp.abs(through * x))

    params = make_params()
    params["blocks"]["traps"] = jnp.ones((4, 2, WIDTH))
    init, step = nj.update_in_backward(embed, spoilt_block, head, stored_momentum())
    return params, init(params), jax.jit(step)


def same(a, b):
    return np.array_equal(a, b, equal_nan=True)


def test_a_loss_that_is_not_finite_changes_nothing():
    params, state, step = trapped()
    before = {**params, "head": params["head"].at[0, 0].set(jnp.inf)}
    after, new_state, report = step(before, state, draw(0)[0])
    chex.assert_trees_all_equal(after, before)
    chex.assert_trees_all_equal(new_state, state)
    assert not np.isfinite(report.loss)
    assert int(report.left_out) == 4 + 2  # the layers, embedding and head


@pytest.mark.parametrize("through", [False, True])
def test_a_part_whose_gradient_is_not_finite_is_left_out_alone(through):
    """The third layer of four, and what lies below if hidden states pass it on."""
    params, state, step = trapped()
    traps = params["blocks"]["traps"].at[2, int(through), 0].set(0.0)
    before = {**params, "blocks": {**params["blocks"], "traps": traps}}
    after, new_state, report = step(before, state, draw(0)[0])
    spoilt = [0, 1, 2] if through else [2]
    assert int(report.left_out) == len(spoilt) + through
    assert np.isfinite(report.loss)
    assert not np.isfinite(report.grad_norm)
    for key, new in after["blocks"].items():
        pairs = zip(new, before["blocks"][key], strict=True)
        assert [i for i, pair in enumerate(pairs) if same(*pair)] == spoilt, key
    assert same(after["embed"], before["embed"]) == through
    assert not same(after["head"], before["head"])
    codes = lambda state: state[0].inner.momentum["blocks"]["up"].codes
    pairs = zip(codes(new_state), codes(state), strict=True)
    assert [i for i, pair in enumerate(pairs) if same(*pair)] == spoilt
    assert int(new_state[0].count) == 1  # as for the parts that were updated


def test_two_optimizers_update_each_their_part():
    tx, rest_tx = optax.sgd(0.1, momentum=0.9), optax.adam(0.01)
    params, state, new, new_state, _ = run_once(tx, rest_tx=rest_tx)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    grads = jax.grad(loss_of)(params, draw(0)[0])
    of_stack = lambda tree: {"blocks": tree["blocks"]}
    of_rest = lambda tree: {key: tree[key] for key in ("embed", "head")}
    for part, alone in ((of_stack, tx), (of_rest, rest_tx)):
        mine = part(params)
        updates, _ = jax.jit(alone.update)(part(grads), alone.init(mine), mine)
        helpers.assert_close(part(new), optax.apply_updates(mine, updates), atol=1e-6)


def is_stack(tree):
    return jax.tree.map(lambda x: x.ndim == 3, tree)


SGD = optax.sgd(0.1, momentum=0.9)
FUNCTIONS = {
    "mask": lambda: optax.masked(SGD, is_stack),
    "labels": lambda: optax.partition({True: SGD, False: optax.adam(0.01)}, is_stack),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_masks_and_labels_may_be_functions_of_the_tree(name):
    tx = FUNCTIONS[name]()
    params, state, new, new_state, _ = run_once(tx)
    expected, expected_state, _ = ordinary(tx)(params, state, draw(0))
    helpers.assert_close(new, expected, atol=1e-6)
    assert_same_state(new_state, expected_state)


def test_a_state_without_an_entry_for_each_layer_is_refused_with_all_its_arrays():
    """Adafactor of a deep stack takes layers for columns."""
    params = make_params(layers=40)
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=16)
    with pytest.raises(ValueError, match="one entry for each layer") as error:
        run_once(tx, params=params)
    for key in ("down", "up"):
        assert f"v_row['blocks']['{key}'] of shape (16, 24)" in str(error.value)


def test_a_leaf_that_is_stored_along_its_layers_is_refused_by_name():
    params = make_params(layers=40)
    params["blocks"]["scale"] = jnp.ones(40)
    tx = nj.quantize_state(nj.momentum(), {"momentum": nj.Int8(16)}, min_size=1)
    with pytest.raises(ValueError, match="does not depend on the number") as error:
        layout_of(tx, jax.eval_shape(lambda: params), "blocks")
    named = [x for x in str(error.value).splitlines() if x.endswith(" does")]
    assert named == ["  .inner.momentum['blocks']['scale'] does"]


def test_blocks_that_are_not_stacked_alike_are_refused_with_all_leaves():
    params = make_params()
    params["blocks"]["scale"] = params["blocks"]["scale"][:3]
    with pytest.raises(ValueError, match=r"\['up'\] of shape \(4, 16, 24\)") as error:
        run_once(optax.sgd(0.1), params=params)
    assert "['scale'] of shape (3, 16)" in str(error.value)


def test_segments_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="must divide the number of layers, 4, got 3"):
        run_once(optax.sgd(0.1), segment=3)


def ending_in(link):
    return lambda params: optax.chain(optax.sgd(0.01, momentum=0.9), link())


SHORT = {
    "round_updates": ending_in(nj.round_updates),
    "split_master": ending_in(nj.split_master),
    "stochastic": functools.partial(built, **BITS, weight_rounding="stochastic"),
    "split": functools.partial(built, **BITS, weight_rounding="split"),
}


@pytest.mark.parametrize(
    "name",
    ["round_updates", *(pytest.param(x, marks=pytest.mark.slow) for x in [*SHORT][1:])],
)
def test_a_step_of_bfloat16_weights_is_the_ordinary_step(name):
    short = optax.tree.cast(make_params(tied=True), jnp.bfloat16)
    tx = SHORT[name](short)
    params, state, new, new_state, _ = run_once(tx, params=short)
    expected, expected_state, _ = ordinary(tx)(params, state, draw(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, expected_state)
    for a, b, p in zip(*map(jax.tree.leaves, (new, expected, params)), strict=True):
        assert (a != b).mean() < 0.01  # gradients are rounded in other places
        assert (b != p).mean() > 0.2


@helpers.on_processors
def test_temporaries_do_not_grow_with_the_number_of_layers():
    """But for the hidden states that are kept; the ordinary step has all gradients."""
    wide = functools.partial(make_params, width=32, hidden=96)
    batch = draw(0)[0]

    def temporaries(layers, take_step):
        params = jax.eval_shape(functools.partial(wide, layers))
        state = jax.eval_shape(tx.init, params)
        step = jax.jit(take_step, donate_argnums=(0, 1))
        compiled = step.lower(params, state, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    tx = optax.chain(nj.momentum(), optax.scale(-0.1))
    backward = nj.update_in_backward(*MODEL, tx).step
    usual = lambda params, state, batch: ordinary(tx)(params, state, batch[None])
    growth = lambda step: temporaries(16, step) - temporaries(4, step)
    kept = 12 * batch.shape[0] * LENGTH * 32 * 4
    gradients = 12 * 4 * 2 * 32 * 96
    assert growth(backward) <= 1.1 * kept
    assert growth(usual) > gradients


def last_two(path, shape):
    del path, shape
    return nj.MatrixAxes(-2, -1)


STORED = {"momentum": nj.Int4(16, stochastic_rounding=True), "basis": nj.Int4(16)}
STACKED = {
    "stochastic int8(muon)": lambda: helpers.make("stochastic int8(muon)", None),
    "int8, 2 bits(two speeds)": lambda: helpers.make("int8, 2 bits(two speeds)", None),
    "round_updates(momentum)": lambda: helpers.make("round_updates(momentum)", None),
    "by rows": lambda: nj.sequence(
        helpers.quantized(helpers.two_speed(), STORED),
        max_bytes=1,
        core_ndim=2,
    ),
    "as_matrices": lambda: nj.as_matrices(
        helpers.quantized(helpers.low_rank(nj.momentum()), helpers.STOCHASTIC),
        lambda path, shape: nj.MatrixAxes(-1, -2),
    ),
}


@pytest.mark.parametrize("name", STACKED)
def test_an_update_of_one_layer_is_its_part_of_the_update_of_all(name):
    """Noise and sketches too: they are those of the stacked leaf."""
    tx = optax.with_extra_args_support(STACKED[name]())
    dtype = jnp.bfloat16 if "round" in name else jnp.float32
    leaf = lambda seed: {
        "blocks": jax.random.normal(jax.random.key(seed), (6, 8, 24), dtype)
    }
    params, state = leaf(9), tx.init(leaf(9))
    layout = layout_of(tx, jax.eval_shape(lambda: params), "blocks")
    update = jax.jit(tx.update)

    def part_of(state, layer):
        nodes = layout.treedef.flatten_up_to(state)
        mine = Stacked.of(layout.of_stack(nodes), layout.stack_axes).part(layer)
        pairs = zip(nodes, mine, strict=True)
        return layout.treedef.unflatten(x if y is None else y for x, y in pairs)

    for step in range(2):
        updates, after = update(leaf(step), state, params)
        for layer in (0, 4):
            one = lambda tree, i=layer: {"blocks": tree["blocks"][i : i + 1]}
            mine, mine_after = update(
                one(leaf(step)), part_of(state, layer), one(params),
                layer=jnp.int32(layer),
            )  # fmt: skip
            helpers.assert_close(mine, one(updates))
            assert_same_state(mine_after, part_of(after, layer))
        state = after
