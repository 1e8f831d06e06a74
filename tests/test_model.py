"""Laws of the model and of sampling from it, on variations of one tiny model."""

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.tree_util import keystr

import helpers
from nanochat_jax import label_params
from nanochat_jax.config import ModelConfig
from nanochat_jax.lm.model import attention, gpt, next_token_loss, param_sharding
from nanochat_jax.lm.model.functions import count_flops_per_token
from nanochat_jax.lm.model.loss import cross_entropy
from nanochat_jax.lm.model.sampling import _next_token, generate, sample
from nanochat_jax.lm.training.accumulate import mean_gradient
from tiny import MODEL

UNTIED = dataclasses.replace(MODEL, weight_tied=False)
BATCH, SEQ = 2, 16


@functools.cache
def initial(config=MODEL):
    return gpt.init(config, 0)


@functools.cache
def built(config=MODEL):
    """A model with noise on all parameters, so that every one of them matters."""
    graphdef, params = initial(config)
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    noisy = [x + 0.2 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    return graphdef, treedef.unflatten(noisy)


@functools.cache
def logits_of(config=MODEL):
    return jax.jit(functools.partial(gpt.apply, initial(config)[0]))


@functools.cache
def loss_and_grads_of(config=MODEL):
    loss = functools.partial(next_token_loss, initial(config)[0])
    return jax.jit(jax.value_and_grad(loss))


def token_ids(length=SEQ, seed=0):
    key = jax.random.key(seed)
    return jax.random.randint(key, (BATCH, length), 0, MODEL.vocab_size)


def shapes(params):
    leaves = jax.tree.leaves_with_path(params)
    return {keystr(path, simple=True, separator="."): x.shape for path, x in leaves}


# Parameters


def test_paths_and_shapes_are_as_documented():
    _, params = initial(UNTIED)
    block = {
        "attention_norm.scale": (32,),
        "attention.query.kernel": (32, 32),
        "attention.key.kernel": (32, 16),
        "attention.value.kernel": (32, 16),
        "attention.out.kernel": (32, 32),
        "ffn_norm.scale": (32,),
        "ffn.gate.kernel": (32, 86),
        "ffn.up.kernel": (32, 86),
        "ffn.down.kernel": (86, 32),
    }
    expected = {f"blocks.{i}.{k}": v for i in range(2) for k, v in block.items()}
    expected |= {"embed.embedding": (61, 32), "final_norm.scale": (32,)}
    assert shapes(params) == expected | {"head.kernel": (32, 61)}
    assert shapes(initial()[1]) == expected


def test_parameters_are_float32_vectors_and_matrices_with_the_right_labels():
    _, params = initial(UNTIED)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    labels = shapes_by_label(params)
    assert set(labels["embedding"]) == {"embed.embedding"}
    assert set(labels["head"]) == {"head.kernel"}
    assert all(path.endswith("norm.scale") for path in labels["vector"])
    assert all(path.endswith(".kernel") for path in labels["matrix"])
    assert {len(s) for s in labels["vector"].values()} == {1}
    assert {len(s) for s in labels["matrix"].values()} == {2}


def shapes_by_label(params):
    labels = jax.tree.leaves(label_params(params))
    found = {label: {} for label in labels}
    for label, (path, shape) in zip(labels, shapes(params).items(), strict=True):
        found[label][path] = shape
    return found


@pytest.mark.parametrize("config", [MODEL, UNTIED], ids=["tied", "untied"])
def test_parameter_count(config):
    d, f, v, layers = config.dim, config.ffn_dim, config.vocab_size, config.n_layers
    grouped = config.kv_heads * config.head_size
    block = 2 * d * d + 2 * d * grouped + 3 * d * f + 2 * d
    expected = layers * block + d + v * d * (1 if config.weight_tied else 2)
    _, params = initial(config)
    assert sum(x.size for x in jax.tree.leaves(params)) == expected


def test_abstract_init_is_init_without_values():
    graphdef, params = initial()
    init = functools.partial(gpt.init, MODEL)
    abstract_graphdef, abstract = jax.eval_shape(init, 0)
    assert abstract_graphdef == graphdef
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, params)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))


def test_seed_decides_the_parameters():
    _, params = initial()
    chex.assert_trees_all_equal(params, gpt.init(MODEL, 0)[1])
    other = gpt.init(MODEL, 1)[1]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), params, other)
    assert not any(x for p, x in jax.tree.leaves_with_path(same) if "kernel" in str(p))


def test_a_kernel_whose_module_declares_no_sharding_is_refused():
    mesh = param_sharding.abstract_mesh({"fsdp": 2})
    params = {"ffn": {"gate2": {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}}}
    with pytest.raises(ValueError, match=r"gate2.*Add `gate2` to the `tensor_splits`"):
        param_sharding.place(params, mesh, MODEL)


# Forward pass


def reference_logits(params, tokens, config=MODEL):
    """The documented model for one sequence, in plain NumPy and float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    rms = lambda x: x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps)
    half, group = config.head_size // 2, config.n_heads // config.kv_heads
    speeds = 10_000.0 ** (-np.arange(half) / half)
    if config.rope_scaling:
        factor, low, high, length = config.rope_scaling
        for i, turns in enumerate(speeds * length / (2 * np.pi)):
            slow = min(max((high - turns) / (high - low), 0), 1)
            speeds[i] *= slow / factor + 1 - slow
    turn = np.exp(1j * np.outer(np.arange(len(tokens)), speeds))

    def rotated(x, gain):
        x = x if config.qk_norm == "none" else rms(x) * gain
        z = (x[:, :half] + 1j * x[:, half:]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    def attention(x, p):
        columns = lambda name, head: np.split(
            x @ p[name]["kernel"],
            p[name]["kernel"].shape[1] // config.head_size,
            axis=1,
        )[head]
        gain = lambda name: p[name]["scale"] if name in p else 1
        heads = []
        for head in range(config.n_heads):
            query = rotated(columns("query", head), gain("query_norm"))
            key = rotated(columns("key", head // group), gain("key_norm"))
            scores = np.exp(query @ key.T / np.sqrt(config.head_size))
            weights = np.tril(scores) / np.tril(scores).sum(axis=1, keepdims=True)
            heads.append(weights @ columns("value", head // group))
        return np.concatenate(heads, axis=1) @ p["out"]["kernel"]

    def ffn(x, p):
        gate = x @ p["gate"]["kernel"]
        up = x @ p["up"]["kernel"]
        return (gate / (1 + np.exp(-gate)) * up) @ p["down"]["kernel"]

    x = params["embed"]["embedding"][tokens]
    for p in params["blocks"].values():
        x = x + attention(rms(x) * p["attention_norm"]["scale"], p["attention"])
        x = x + ffn(rms(x) * p["ffn_norm"]["scale"], p["ffn"])
    x = rms(x) * params["final_norm"]["scale"]
    tied = params["embed"]["embedding"].T
    return x @ (params["head"]["kernel"] if "head" in params else tied)


@pytest.mark.parametrize("config", [MODEL, UNTIED], ids=["tied", "untied"])
def test_logits_are_those_of_the_reference(config):
    params = built(config)[1]
    expected = [reference_logits(params, row) for row in np.asarray(token_ids())]
    np.testing.assert_allclose(
        logits_of(config)(params, token_ids()), expected, atol=1e-3
    )


# Models of others: heads of a size of their own, gains, another norm and rotation.
PUBLISHED = dataclasses.replace(
    MODEL,
    head_dim=12,
    qk_norm="gain",
    norm_eps=1e-2,
    rope_scaling=(8.0, 1.0, 4.0, 64.0),
    n_layers=1,
)
WITHOUT = dataclasses.replace(PUBLISHED, qk_norm="none")


@pytest.mark.parametrize("config", [PUBLISHED, WITHOUT], ids=["gain", "none"])
def test_published_shapes_are_those_of_the_reference(config):
    params = built(config)[1]
    names = ["query_norm", "key_norm"] if config.qk_norm == "gain" else []
    assert {*names} == params["blocks"][0]["attention"].keys() & {
        "query_norm",
        "key_norm",
    }
    labels = label_params(params)["blocks"][0]["attention"]
    assert all(labels[name] == {"scale": "vector"} for name in names)
    expected = [
        reference_logits(params, row, config) for row in np.asarray(token_ids())
    ]
    np.testing.assert_allclose(
        logits_of(config)(params, token_ids()), expected, atol=1e-3
    )


@pytest.mark.parametrize("t", [0, 3, 15])
def test_logits_do_not_depend_on_later_tokens(t):
    logits, params = logits_of(), built()[1]
    before = token_ids()
    after = before.at[:, t].set((before[:, t] + 1) % MODEL.vocab_size)
    a, b = logits(params, before), logits(params, after)
    np.testing.assert_array_equal(a[:, :t], b[:, :t])
    assert (jnp.abs(a[:, t:] - b[:, t:]).max(axis=-1) > 1e-4).all()


def _attention_and_gradients(attend, inputs):
    """Returns a jitted function of `inputs`, compiled."""
    f = lambda *inputs: jax.vjp(attend, *inputs)[1](jnp.cos(inputs[0]))
    both = lambda *inputs: (attend(*inputs), f(*inputs))
    return jax.jit(both).lower(*inputs).compile()


@pytest.mark.parametrize("keep_scores", [True, False])
def test_attention_in_parts_is_attention_to_all_earlier_keys(keep_scores):
    shapes = [(2, 200, heads, 16) for heads in (4, 2, 2)]  # parts of 64, the last of 8
    inputs = [3 * jax.random.normal(jax.random.key(i), x) for i, x in enumerate(shapes)]
    whole = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    parts = lambda *inputs: jnp.swapaxes(
        attention.causal_attention(*inputs, keep_scores=keep_scores), 1, 2
    )
    run = [_attention_and_gradients(attend, inputs) for attend in (whole, parts)]
    chex.assert_trees_all_close(*(f(*inputs) for f in run), atol=1e-4)
    short = [x.astype(jnp.bfloat16) for x in inputs]
    exact = whole(*(x.astype(jnp.float32) for x in short))
    error = lambda f: float(jnp.linalg.norm(jax.jit(f)(*short) - exact))
    assert 0 < error(parts) < 1.1 * error(whole)


@helpers.on_processors
def test_one_part_of_the_scores_is_held_where_they_are_not_kept():
    inputs = [jnp.ones((1, 1024, 2, 8))] * 3
    scores = 4 * 2 * 1024**2

    def held(keep_scores):
        attend = functools.partial(attention.causal_attention, keep_scores=keep_scores)
        heads_first = lambda x: jnp.swapaxes(x, 1, 2)
        gradient = jax.jit(
            lambda *inputs: jax.vjp(attend, *inputs)[1](heads_first(inputs[0]))
        )
        return gradient.lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    # Of a part: its scores, their weights, and the gradient of these.
    assert held(False) < 0.9 * scores < 1.3 * scores < held(True)


rotate = jax.jit(functools.partial(attention.rotate, theta=10_000.0))


def test_rotation_makes_scores_depend_on_distance_only():
    query, key = np.random.default_rng(0).standard_normal((2, 1, SEQ, 4, 8), np.float32)
    scores = lambda query, key: np.einsum("bsnh,btnh->bnst", query, key)
    here, there = np.arange(SEQ), np.arange(SEQ) + 50
    expected = scores(rotate(query, here), rotate(key, here))
    shifted = scores(rotate(query, there), rotate(key, there))
    np.testing.assert_allclose(shifted, expected, atol=1e-4)
    assert np.abs(expected - scores(query, key)).max() > 0.1


def test_rotation_keeps_lengths_and_the_first_position():
    x = np.random.default_rng(0).standard_normal((1, SEQ, 4, 8), np.float32)
    y = np.asarray(rotate(x, np.arange(SEQ)))
    norm = functools.partial(np.linalg.norm, axis=-1)
    np.testing.assert_allclose(norm(y), norm(x), rtol=1e-5)
    np.testing.assert_array_equal(y[:, 0], x[:, 0])


def test_grouped_heads_are_repeated_heads():
    full = dataclasses.replace(MODEL, n_kv_heads=MODEL.n_heads)
    grouped_params = built()[1]
    groups = MODEL.n_heads // MODEL.kv_heads

    def repeat(path, x):
        if not {"key", "value"} & set(
            keystr(path, simple=True, separator=".").split(".")
        ):
            return x
        heads = x.reshape(MODEL.dim, MODEL.kv_heads, MODEL.head_size)
        return jnp.repeat(heads, groups, axis=1).reshape(MODEL.dim, -1)

    full_params = jax.tree.map_with_path(repeat, grouped_params)
    np.testing.assert_allclose(
        logits_of()(grouped_params, token_ids()),
        logits_of(full)(full_params, token_ids()),
        atol=1e-5,
    )


def test_queries_and_keys_are_normalised():
    params = built()[1]
    louder = jax.tree.map_with_path(
        lambda path, x: 8 * x if "query" in str(path) or "'key'" in str(path) else x,
        params,
    )
    logits = logits_of()
    np.testing.assert_allclose(
        logits(params, token_ids()), logits(louder, token_ids()), atol=1e-3
    )


@pytest.mark.parametrize("config", [MODEL, UNTIED], ids=["tied", "untied"])
def test_untrained_model_guesses_uniformly(config):
    logits = logits_of(config)(initial(config)[1], token_ids())
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, token_ids(seed=1))
    assert abs(losses.mean() - math.log(config.vocab_size)) < 0.1
    assert jnp.abs(logits).max() < 1


def test_loss_is_the_mean_negative_log_probability_of_the_next_token():
    params, batch = built()[1], token_ids(SEQ + 1)
    loss, _ = loss_and_grads_of()(params, batch)
    logits = np.asarray(logits_of()(params, batch[:, :-1]), np.float64)
    rows = np.log(np.exp(logits).sum(axis=-1))
    chosen = np.take_along_axis(logits, np.asarray(batch)[:, 1:, None], axis=-1)
    np.testing.assert_allclose(loss, (rows - chosen[..., 0]).mean(), rtol=1e-5)


def test_recomputation_changes_neither_loss_nor_gradients():
    params, batch = built()[1], token_ids(SEQ + 1)
    remat = dataclasses.replace(MODEL, remat=True)
    plain, recomputed = loss_and_grads_of(), loss_and_grads_of(remat)
    assert "optimization_barrier" in recomputed.lower(params, batch).as_text()
    chex.assert_trees_all_close(
        plain(params, batch), recomputed(params, batch), rtol=1e-4, atol=1e-6
    )


def test_bfloat16_is_the_type_of_activations_only():
    config = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    params = built()[1]
    chex.assert_trees_all_equal_dtypes(initial(config)[1], params)
    batch = token_ids(SEQ + 1)
    loss, grads = jax.eval_shape(loss_and_grads_of(config), params, batch)
    chex.assert_trees_all_equal_dtypes(grads, params)
    logits = logits_of(config)(params, token_ids())
    exact = logits_of()(params, token_ids())
    assert logits.dtype == loss.dtype == jnp.float32
    assert 1e-4 < jnp.abs(logits - exact).max() < 0.1 * jnp.abs(exact).max()


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_keeps_the_gradient_of_a_frequent_token(param_dtype):
    """A sum in bfloat16 stands still from 256 equal terms on."""
    config = dataclasses.replace(
        MODEL, compute_dtype="bfloat16", param_dtype=param_dtype
    )
    graphdef, params = initial(config)
    ids = jax.random.randint(jax.random.key(0), (64, 64), 0, MODEL.vocab_size)
    frequent = jax.random.bernoulli(jax.random.key(1), 0.5, ids.shape)
    ids = jnp.where(frequent, 7, ids)  # 2,000 of 4,096
    weights = jax.random.uniform(jax.random.key(2), (*ids.shape, MODEL.dim))
    weights = weights.astype(jnp.bfloat16)

    def total(params):
        return jnp.sum(nnx.merge(graphdef, params).look_up(ids) * weights)

    grads = jax.jit(jax.grad(total))(params)["embed"]["embedding"]
    assert grads.dtype == param_dtype
    grads = grads.astype(jnp.float32)
    exact = jnp.zeros_like(grads).at[ids].add(weights.astype(jnp.float32))
    error = jnp.linalg.norm(grads - exact, axis=-1) / jnp.linalg.norm(exact, axis=-1)
    assert error.max() < 0.01


def test_sums_over_chunks_and_microbatches_are_not_in_a_short_type():
    """In bfloat16 they would stop at 256 ones."""
    weights = jnp.ones([2], jnp.bfloat16)
    count = 300
    loss = lambda weights, batch: jnp.sum(weights.astype(jnp.float32))
    batch = jnp.zeros((count, 1, 2), jnp.int32)
    _, mean = mean_gradient(loss, weights, batch)
    np.testing.assert_array_equal(mean.astype(jnp.float32), 1.0)
    summed = lambda w, x, _: jnp.sum(x * w.astype(jnp.float32)[None, None])
    x, labels = jnp.ones((1, count, 2)), jnp.zeros((1, count), jnp.int32)
    grad = jax.grad(lambda w, chunk: cross_entropy(summed, w, x, labels, chunk))
    whole, chunks = (grad(weights, c).astype(jnp.float32) for c in (0, 1))
    np.testing.assert_allclose(chunks, whole, rtol=0.01)


def test_foreign_tokens_show_as_nan():
    logits, params = logits_of(), built()[1]
    foreign = token_ids().at[0, 0].set(MODEL.vocab_size)
    assert jnp.isnan(logits(params, foreign)[0]).all()


def test_training_lowers_the_loss():
    value_and_grad = loss_and_grads_of()
    _, params = initial()
    tx = optax.adam(1e-2)
    update, state = jax.jit(tx.update), tx.init(params)
    losses, batch = [], token_ids(SEQ + 1)
    for _ in range(30):
        loss, grads = value_and_grad(params, batch)
        updates, state = update(grads, state)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]


def test_flops_are_three_forward_passes_as_the_compiler_counts_them():
    config = ModelConfig(
        dim=512, n_layers=3, n_heads=8, n_kv_heads=4, ffn_mult=1.0, vocab_size=1024
    )
    graphdef, params = jax.eval_shape(functools.partial(gpt.init, config), 0)
    batch = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    forward = jax.jit(functools.partial(gpt.apply, graphdef)).lower(params, batch)
    analysis: Any = forward.cost_analysis()
    counted = analysis["flops"] / (2 * 256)
    count = functools.partial(count_flops_per_token, config)
    # Of four parts of the queries the first needs a quarter of the keys, and so on; the
    # convention counts all.
    attention = 2 * (count(256) - count(128))
    assert 1.0 <= 3 * counted / (count(256) - 3 / 8 * attention) < 1.03
    assert count_flops_per_token(config) > count_flops_per_token(config, 256)


# Generation


PROMPT = (3, 1, 4, 1, 5)


def continued(prompt=PROMPT, max_tokens=8, **kwargs):
    return list(generate(*built(), MODEL, prompt, max_tokens=max_tokens, **kwargs))


def test_reading_in_pieces_is_reading_at_once():
    @jax.jit
    def in_pieces(params, tokens):
        model = nnx.merge(graphdef, params)
        cache, pieces = gpt.init_cache(MODEL, BATCH, SEQ + 3), []
        for piece in jnp.split(tokens, [5, 6, 7], axis=1):
            x, cache = model.extend(piece, cache)
            pieces.append(model.logits(x))
        return jnp.concatenate(pieces, axis=1), cache

    graphdef, params = built()
    logits, cache = in_pieces(params, token_ids())
    np.testing.assert_allclose(logits, logits_of()(params, token_ids()), atol=1e-4)
    assert cache.length == SEQ
    assert all(not layer.keys[:, SEQ:].any() for layer in cache.layers)


def test_greedy_generation_takes_the_likeliest_token_of_a_full_pass():
    sequence: list[int] = list(PROMPT)
    for _ in range(8):
        padded = np.zeros((BATCH, SEQ), np.int32)
        padded[:, : len(sequence)] = sequence
        logits = logits_of()(built()[1], padded)
        sequence.append(int(logits[0, len(sequence) - 1].argmax()))
    assert continued(temperature=0.0) == sequence[len(PROMPT) :]
    assert len(set(sequence)) > 5


def test_tokens_depend_on_the_seed_and_what_precedes_alone():
    drawn = functools.partial(continued, temperature=100.0)
    tokens = drawn(seed=1)
    assert drawn(seed=1) == tokens
    assert drawn(seed=1, max_tokens=3) == tokens[:3]
    assert drawn((*PROMPT, *tokens[:1]), seed=1, max_tokens=7) == tokens[1:]
    assert drawn(seed=2) != tokens
    assert len(set(tokens)) > 4


def test_prompts_of_about_a_size_share_compiled_steps():
    step: Any = _next_token
    continued(max_tokens=2)
    before = step._cache_size()
    for size, temperature in {5: 0, 6: 1, 7: 0.5, 8: 2.0}.items():
        continued(range(size), max_tokens=2, temperature=temperature, seed=size)
    assert step._cache_size() == before


def test_generation_may_fill_the_whole_context():
    assert len(continued(range(11), max_tokens=5)) == 5
    assert continued(range(16), max_tokens=0) == []


def test_sampling_laws():
    logits = 3 * jax.random.normal(jax.random.key(0), (MODEL.vocab_size,))
    keys = jax.random.split(jax.random.key(1), 500)

    @functools.partial(jax.jit, static_argnames="top_k")
    def draw(logits, temperature, top_k=None):
        return jax.vmap(lambda key: sample(logits, key, temperature, top_k))(keys)

    np.testing.assert_array_equal(draw(logits, 2.0), draw(logits / 2, 1.0))
    assert set(draw(logits, 0.0).tolist()) == {int(logits.argmax())}
    likeliest = set(jnp.argsort(-logits)[:3].tolist())
    assert set(draw(logits, 1.0, 3).tolist()) == likeliest
    assert len(set(draw(logits, 1.0).tolist())) > 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt": ()}, "at least one token"),
        ({"prompt": (3, 61, -1)}, r"0 to 60, got \[-1, 61\]"),
        ({"max_tokens": 12}, r"5 \+ 12 = 17"),
        ({"max_tokens": -1}, "`max_tokens`"),
        ({"temperature": -0.5}, "got -0.5"),
        ({"top_k": 0}, "`top_k` must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(kwargs, message):
    kwargs = {"prompt": PROMPT, "max_tokens": 8} | kwargs
    with pytest.raises(ValueError, match=message):
        generate(*built(), MODEL, **kwargs)


def test_all_offences_are_in_one_message():
    with pytest.raises(ValueError, match=r"prompt(.|\n)*temperature(.|\n)*top_k"):
        continued((), temperature=-1.0, top_k=0)
