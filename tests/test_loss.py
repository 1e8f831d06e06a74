"""Cross-entropy in chunks is cross-entropy, and its logits never stand in full."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax.lm.model import gpt, next_token_loss, table
from nanochat_jax.lm.model.loss import cross_entropy
from nanochat_jax.lm.model.table import ReadOut
from nanochat_jax.optimizer.memory import planned_bytes
from tiny import MODEL

BATCH, DIM, VOCAB = 2, 8, 61


tied = ReadOut(axis=0, vocab_size=VOCAB)
untied = ReadOut(axis=1, vocab_size=VOCAB)


def example(length, head=tied):
    rng = np.random.default_rng(length)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    shape = (VOCAB, DIM) if head is tied else (DIM, VOCAB)
    labels = jnp.asarray(rng.integers(0, VOCAB, (BATCH, length)))
    return draw(*shape), draw(BATCH, length, DIM), labels


def plain(head, weights, x, labels):
    weights = weights.astype(x.dtype)
    logits = (x @ (weights if head is untied else weights.T)).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def loss_and_grads(loss, *args):
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(*args)


def assert_near(got, expected):
    """Within 1e-6 of the size of each array."""
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("head", "length", "chunk"),
    [
        (tied, 16, 8),  # four chunks of four positions
        (untied, 16, 8),
        (tied, 17, 8),  # five chunks, the last of one position
        (tied, 17, 1),  # less than one position of all sequences
        (untied, 7, 12),  # two chunks, the last of three positions
        (tied, 7, 14),  # one chunk
        (tied, 7, 1000),
    ],
)
def test_loss_and_gradients_in_chunks_are_those_at_once(head, length, chunk):
    args = example(length, head)
    chunked = functools.partial(cross_entropy, head.loss, chunk=chunk)
    got = loss_and_grads(chunked, *args)
    assert_near(got, loss_and_grads(functools.partial(plain, head), *args))
    np.testing.assert_allclose(chunked(*args), got[0], rtol=1e-6)


def test_the_gradient_is_scaled_by_what_follows():
    weights, x, labels = example(17)
    chunked = lambda *args: 3 * cross_entropy(tied.loss, *args, labels, 8) ** 2
    full = lambda *args: 3 * plain(tied, *args, labels) ** 2
    assert_near(loss_and_grads(chunked, weights, x), loss_and_grads(full, weights, x))


def test_gradients_have_the_types_of_what_they_are_of():
    weights, x, labels = example(16)
    x = x.astype(jnp.bfloat16)
    chunked = lambda *args: cross_entropy(tied.loss, *args, labels, 8)
    loss, grads = loss_and_grads(chunked, weights, x)
    assert [g.dtype for g in grads] == [jnp.float32, jnp.bfloat16]
    full = loss_and_grads(lambda *args: plain(tied, *args, labels), weights, x)
    chex.assert_trees_all_close((loss, grads), full, rtol=0.05, atol=1e-3)


def test_a_label_beyond_the_vocabulary_shows_as_nan():
    weights, x, labels = example(17)
    assert jnp.isnan(
        cross_entropy(tied.loss, weights, x, labels.at[0, 0].set(VOCAB), 8)
    )


@pytest.mark.parametrize("head", [tied, untied])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_short_table_is_read_in_pieces_with_the_same_result(
    monkeypatch, head, padding, dtype
):
    head = head._replace(vocab_size=VOCAB - padding)
    weights, x, labels = example(16, tied if head.axis == 0 else untied)
    weights, x = weights.astype(jnp.bfloat16), x.astype(dtype)
    labels = jnp.where(labels < VOCAB - padding, labels, -1)
    run = lambda: (
        head.logits(weights, x),
        *jax.value_and_grad(head.loss, (0, 1))(weights, x, labels),
    )
    whole = run()
    monkeypatch.setattr(table, "group_bytes", lambda: 4 * DIM * 7)
    pieces = str(jax.make_jaxpr(head.logits)(weights, x))
    assert "while" in pieces or "scan" in pieces
    assert f"f32[{VOCAB},{DIM}]" not in pieces
    exact = dtype == jnp.float32
    chex.assert_trees_all_close(
        run(), whole, rtol=1e-5 if exact else 0.03, atol=1e-5 if exact else 0.03
    )


def test_labels_below_zero_are_not_predicted():
    weights, x, labels = example(17)
    some = labels.at[:, ::3].set(~labels[:, ::3])
    kept = some >= 0
    assert 0 < kept.sum() < kept.size
    got = loss_and_grads(
        lambda *args: cross_entropy(tied.loss, *args, some, 8), weights, x
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ weights.T, labels)
    np.testing.assert_allclose(got[0], losses[kept].mean(), rtol=1e-6)
    np.testing.assert_array_equal(got[1][1][~kept], 0)


def test_a_model_reads_complements_and_does_not_predict_them():
    graphdef, params, batch = example_model()
    marked = batch.at[:, :5].set(~batch[:, :5])
    logits = gpt.apply(graphdef, params, batch[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    got = next_token_loss(graphdef, params, marked)
    np.testing.assert_allclose(got, losses[:, 4:].mean(), rtol=1e-5)


def test_logits_never_stand_in_full():
    graphdef, params, batch = example_model(loss_chunk=8)
    text = lowered(graphdef, params, batch).as_text()
    assert "2x4x61xf32" in text
    assert "2x16x61xf32" not in text
    graphdef, params, batch = example_model(loss_chunk=0)
    assert "2x16x61xf32" in lowered(graphdef, params, batch).as_text()


def test_chunks_take_less_memory():
    rows, length, vocab, chunk = 4, 256, 2048, 128
    weights = jax.ShapeDtypeStruct((vocab, 16), jnp.float32)
    x = jax.ShapeDtypeStruct((rows, length, 16), jnp.float32)
    labels = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def temporaries(chunk):
        loss = functools.partial(cross_entropy, ReadOut(0, vocab).loss, chunk=chunk)
        step = jax.jit(jax.value_and_grad(loss, (0, 1)))
        return planned_bytes(step.lower(weights, x, labels).compile())["temp_bytes"]

    assert temporaries(0) >= 4 * rows * length * vocab
    assert temporaries(chunk) < temporaries(0) / 4


def test_evaluation_reads_out_once_and_training_three_times():
    weights, x, labels = example(16)
    loss = lambda *args: cross_entropy(tied.loss, *args, labels, 8)
    count = lambda f: str(jax.make_jaxpr(f)(weights, x)).count("dot_general")
    assert count(loss) == 1
    assert count(jax.grad(loss, (0, 1))) == 3  # nothing is recomputed


@pytest.mark.parametrize("weight_tied", [True, False])
def test_the_model_gives_the_same_loss_for_any_chunk(weight_tied):
    results = []
    for chunk in (0, 6):
        graphdef, params, batch = example_model(
            loss_chunk=chunk, weight_tied=weight_tied
        )
        loss = functools.partial(next_token_loss, graphdef)
        results.append(jax.jit(jax.value_and_grad(loss))(params, batch))
    assert_near(*results)


def example_model(**kwargs):
    config = dataclasses.replace(MODEL, n_layers=1, **kwargs)
    graphdef, params = gpt.init(config, 0)
    return graphdef, params, jnp.arange(2 * 17).reshape(2, 17)


def lowered(graphdef, params, batch):
    loss = functools.partial(next_token_loss, graphdef)
    return jax.jit(jax.value_and_grad(loss)).lower(params, batch)
