"""Blocks stacked and run by a loop are the blocks one by one."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import helpers
import nanochat_jax as nj
import tiny
from nanochat_jax.config import Config
from nanochat_jax.lm.checkpoints import record, weights_file
from nanochat_jax.lm.checkpoints.pretrained import load_trained
from nanochat_jax.lm.checkpoints.store import Checkpoints
from nanochat_jax.lm.model import block, gpt, next_token_loss
from nanochat_jax.lm.model.layer_stacking import unstack_layers
from nanochat_jax.lm.model.sampling import generate
from nanochat_jax.optimizer.memory import compiled_bytes

APART = tiny.MODEL
STACKED = dataclasses.replace(APART, scan_layers=True)
BATCH = np.arange(2 * 17).reshape(2, 17) % 61


@functools.cache
def initial(config):
    return gpt.init(config, 0)


@functools.cache
def noisy():
    """Parameters of blocks one by one, with noise, so that every one matters."""
    leaves, treedef = jax.tree.flatten(initial(APART)[1])
    rng = np.random.default_rng(0)
    draw = lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32)
    return treedef.unflatten([draw(x) for x in leaves])


def stack_layers(params):
    """Parameters as a model with `scan_layers` has them."""
    stack = lambda *layers: jnp.stack(layers)
    return {**params, "blocks": jax.tree.map(stack, *params["blocks"].values())}


def loss_and_grads(config, params):
    loss = functools.partial(next_token_loss, initial(config)[0])
    return jax.jit(jax.value_and_grad(loss))(params, BATCH)


@functools.cache
def expected():
    return loss_and_grads(APART, noisy())


# The model


def test_a_seed_gives_the_same_parameters():
    apart, stacked = initial(APART)[1], initial(STACKED)[1]
    chex.assert_trees_all_equal(stack_layers(apart), stacked)
    chex.assert_trees_all_equal(unstack_layers(stacked), apart)
    assert stacked["blocks"]["ffn"]["up"]["kernel"].shape == (2, 32, 86)


def test_parameters_are_those_of_blocks_made_one_after_another():
    rngs = nnx.Rngs(jax.random.key(0))
    nnx.Embed(APART.table_size, APART.dim, rngs=rngs)  # draws first
    blocks = [block.Block(APART, rngs=rngs) for _ in range(APART.n_layers)]
    pure = {i: nnx.to_pure_dict(nnx.state(block)) for i, block in enumerate(blocks)}
    chex.assert_trees_all_close(initial(APART)[1]["blocks"], pure, rtol=1e-6)


@helpers.on_processors
@pytest.mark.parametrize("scan", [False, True], ids=["apart", "stacked"])
def test_parameters_are_made_in_room_for_one_more_of_each(scan):
    config = dataclasses.replace(APART, n_layers=16, scan_layers=scan)
    init = jax.jit(lambda: gpt.init(config, 0)[1]).lower().compile()
    plan = init.memory_analysis()
    assert plan.temp_size_in_bytes <= plan.output_size_in_bytes


@pytest.mark.parametrize("remat", [False, True])
def test_loss_and_gradients_are_those_of_blocks_one_by_one(remat):
    config = dataclasses.replace(STACKED, remat=remat)
    loss, grads = loss_and_grads(config, stack_layers(noisy()))
    np.testing.assert_allclose(loss, expected()[0], rtol=1e-6)
    # Compiled or op by op, blocks one by one themselves differ by 1.7e-6.
    assert_near(unstack_layers(grads), expected()[1], 3e-6)


def assert_near(got, wanted, tolerance):
    """Within a fraction of the size of each array."""
    for a, b in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_the_program_does_not_grow_with_layers():
    def products(config):
        graphdef, params = jax.eval_shape(functools.partial(gpt.init, config), 0)
        loss = functools.partial(next_token_loss, graphdef)
        return str(jax.make_jaxpr(jax.grad(loss))(params, BATCH)).count("dot_general")

    deeper = lambda config: dataclasses.replace(config, n_layers=6)
    assert products(STACKED) == products(deeper(STACKED)) < products(APART)
    assert products(deeper(APART)) > 1.5 * products(APART)


def test_a_bfloat16_ternary_model_is_scanned_too():
    changes = {"compute_dtype": "bfloat16", "ternary": True}
    config = dataclasses.replace(STACKED, **changes)
    loss = lambda config: functools.partial(next_token_loss, initial(config)[0])
    stacked = jax.jit(loss(config))(stack_layers(noisy()), BATCH)
    apart = dataclasses.replace(APART, **changes)
    np.testing.assert_allclose(stacked, jax.jit(loss(apart))(noisy(), BATCH), rtol=1e-2)
    grads = jax.eval_shape(jax.grad(loss(config)), stack_layers(noisy()), BATCH)
    assert {x.dtype.name for x in jax.tree.leaves(grads)} == {"float32"}


# Its optimizer


def test_stacked_gains_are_vectors_and_stacked_kernels_matrices():
    labels = nj.label_params(initial(STACKED)[1])["blocks"]
    assert labels["attention_norm"]["scale"] == labels["ffn_norm"]["scale"] == "vector"
    kernels = jax.tree.leaves((labels["attention"], labels["ffn"]))
    assert kernels == ["matrix"] * 7


@pytest.mark.parametrize("bits", [pytest.param(32, marks=pytest.mark.slow), 8])
def test_updates_are_those_of_blocks_one_by_one(bits):
    config = nj.OptimizerConfig(
        use_8bit_optim=bits == 8, quant_min_size=0, weight_decay=0.1, ns_steps=2,
        ns_dtype="float32",
    )  # fmt: skip
    apart, stacked = noisy(), stack_layers(noisy())
    grads = expected()[1]
    updates = update_twice(config, apart, grads)
    got = update_twice(config, stacked, stack_layers(grads))
    # Sums in another order may tip a code to its neighbour.
    assert_near(unstack_layers(got), updates, 1e-5 if bits == 32 else 1e-2)


def update_twice(config, params, grads):
    tx = nj.build_optimizer(config, params)
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(params), params)
    return update(grads, state, params)[0]


def test_each_layer_has_a_basis_of_its_own():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    grads = draw(3, 24, 4) @ draw(3, 4, 40)  # each layer's of rank 4
    tx = nj.sequence(nj.galore(nj.momentum(0.0), 4), max_bytes=1, core_ndim=2)
    params = {"a": jnp.zeros_like(grads), "b": jnp.zeros((2, 2))}
    grads = {"a": grads, "b": jnp.ones((2, 2))}
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["a"], grads["a"], atol=1e-3)
    assert state.basis["a"].shape == (3, 24, 4)


def test_galore_takes_a_stacked_model():
    config = Config(
        **dataclasses.asdict(STACKED),
        use_galore=True,
        use_8bit_optim=True,
        galore_rank=8,
        quant_min_size=0,
        ns_steps=2,
    )
    params = initial(STACKED)[1]
    tx = nj.build_optimizer(config, params)
    grads = stack_layers(expected()[1])
    state = tx.init(params)
    updates, new_state = jax.jit(tx.update)(grads, state, params)
    chex.assert_tree_all_finite(updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(updates)) > 0
    report = nj.memory_report(tx, params)
    assert report.total_bytes == sum(x.nbytes for x in jax.tree.leaves(state))


@helpers.on_processors
def test_few_layers_of_a_stack_are_worked_on_at_a_time():
    stack = {"a": jnp.zeros((32, 64, 64)), "b": jnp.zeros((8, 8))}
    muon = lambda **kwargs: nj.sequence(
        nj.quantize_state(nj.momentum(), {"momentum": nj.Int8()}), **kwargs
    )
    few = compiled_bytes(muon(max_bytes=1 << 15, core_ndim=2), stack)["temp_bytes"]
    assert few < compiled_bytes(muon(max_bytes=1 << 15), stack)["temp_bytes"] / 4


# Its cache, checkpoints and exports


def continued(config, params, **kwargs):
    graphdef = initial(config)[0]
    tokens = generate(graphdef, params, config, (3, 1, 4), max_tokens=8, **kwargs)
    return list(tokens)


def test_the_same_tokens_are_generated():
    stacked = stack_layers(noisy())
    for temperature in (0.0, 1.0):
        tokens = continued(STACKED, stacked, temperature=temperature, seed=1)
        assert tokens == continued(APART, noisy(), temperature=temperature, seed=1)


def test_reading_in_pieces_is_reading_at_once():
    @jax.jit
    def in_pieces(params, tokens):
        network = nnx.merge(graphdef, params)
        cache, pieces = gpt.init_cache(STACKED, 2, 16), []
        for piece in jnp.split(tokens, [5, 6], axis=1):
            x, cache = network.extend(piece, cache)
            pieces.append(network.logits(x))
        return jnp.concatenate(pieces, axis=1)

    graphdef, params = initial(STACKED)[0], stack_layers(noisy())
    whole = jax.jit(functools.partial(gpt.apply, graphdef))(params, BATCH[:, :-1])
    np.testing.assert_allclose(in_pieces(params, BATCH[:, :-1]), whole, atol=1e-4)


def test_a_stacked_model_exports_as_blocks_one_by_one(tmp_path):
    paths = tmp_path / "apart.safetensors", tmp_path / "stacked.safetensors"
    models = (APART, noisy()), (STACKED, stack_layers(noisy()))
    for path, (config, params) in zip(paths, models, strict=True):
        weights_file.save(path, config, params, step=1, tokenizer="bytes")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    beside = [path.with_suffix(".json").read_text() for path in paths]
    assert beside[0] == beside[1]
    config, params = weights_file.load(paths[1])
    assert config == APART
    chex.assert_trees_all_equal(params, noisy())


def test_a_checkpoint_gives_back_the_stacked_model(tmp_path):
    config = Config(**dataclasses.asdict(STACKED))
    meta = record.make(config, data="", tokenizer="bytes")
    params = stack_layers(noisy())
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, {"params": params}, meta)
    trained = load_trained(tmp_path / "run")
    assert trained.config == STACKED
    chex.assert_trees_all_equal(trained.params, params)
    assert continued(STACKED, trained.params) == continued(APART, noisy())
