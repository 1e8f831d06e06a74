"""The laws of codecs: bounded error, idempotence, unbiased stochastic rounding."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import nanochat_jax as nj

# Every new shape is a new compilation, so shapes and block sizes come from short lists.
arrays = st.sampled_from([(40,), (3, 17), (2, 3, 32), (5, 1)]).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-1e3, 1e3, width=32))
)
codecs = st.sampled_from(
    [
        kind(block, scale_dtype=scales)
        for kind in (nj.Int8, nj.Int4)
        for block, scales in ((1, "float32"), (16, "float32"), (16, "bfloat16"))
    ]
)


def decode(codec, stored, like):
    return np.asarray(codec.decode(stored, like.shape[-1]))


def steps(codec, stored, like):
    """The quantisation step at each entry."""
    scales = np.asarray(stored.scales, np.float32)
    return np.repeat(scales, min(codec.block_size, like.shape[-1]), axis=-1)[
        ..., : like.shape[-1]
    ]


@given(arrays, codecs)
def test_error_is_at_most_half_a_step(x, codec):
    stored = codec.encode(jnp.asarray(x))
    error = np.abs(decode(codec, stored, x) - x)
    assert (error <= 0.5 * steps(codec, stored, x) * (1 + 1e-5) + 1e-35).all()


@given(arrays, codecs)
def test_storing_again_changes_nothing(x, codec):
    stored = codec.encode(jnp.asarray(x))
    again = codec.encode(jnp.asarray(decode(codec, stored, x)))
    np.testing.assert_array_equal(again.codes, stored.codes)


@given(arrays, codecs)
def test_shapes_follow_the_array(x, codec):
    codes, scales = codec.encode(jnp.asarray(x))
    rows, n = x.shape[:-1], x.shape[-1]
    blocks = -(-n // min(codec.block_size, n))
    assert scales.shape == (*rows, blocks)
    assert codes.shape == (*rows, n if codec.name == "int8" else -(-n // 2))


@pytest.mark.parametrize("kind", [nj.Int8, nj.Int4])
def test_zero_is_stored_as_zero(kind):
    codes, scales = kind().encode(jnp.zeros((4, 200)))
    assert not codes.any()
    assert not scales.any()


@pytest.mark.parametrize("kind", [nj.Int8, nj.Int4])
def test_blocks_do_not_cross_rows(kind):
    x = jax.random.normal(jax.random.key(0), (4, 40))
    loud = x.at[0].multiply(1e6)
    codec = kind(16)
    a, b = (decode(codec, codec.encode(y), y) for y in (x, loud))
    np.testing.assert_array_equal(a[1:], b[1:])


@pytest.mark.parametrize("kind", [nj.Int8, nj.Int4])
def test_stochastic_rounding_is_unbiased_and_within_a_step(kind):
    codec = kind(64, stochastic_rounding=True)
    x = jax.random.normal(jax.random.key(0), (8, 64))
    keys = jax.random.split(jax.random.key(1), 1000)
    draws = jax.vmap(lambda key: codec.decode(codec.encode(x, key), 64))(keys)
    x, draws = np.asarray(x), np.asarray(draws)
    step = steps(codec, codec.encode(jnp.asarray(x), keys[0]), x)
    assert (np.abs(draws - x) <= step * (1 + 1e-5)).all()
    # The deviation of one draw is at most half a step; five of the mean's is far out.
    assert (np.abs(draws.mean(0) - x) <= 5 * 0.5 * step / 1000**0.5).all()
    assert draws.std(0).max() > 0.4 * step.min()


def test_stochastic_rounding_without_a_key_is_refused():
    with pytest.raises(ValueError, match="needs a `key`, got None"):
        nj.Int8(stochastic_rounding=True).encode(jnp.ones(4))


@pytest.mark.parametrize("kind", [nj.Int8, nj.Int4])
def test_block_size_must_be_positive(kind):
    with pytest.raises(ValueError, match="`block_size` must be at least 1, got 0"):
        kind(0)


@pytest.mark.parametrize(("beta", "gain"), [(0.9, 2.294), (0.95, 3.203)])
def test_stored_momentum_obeys_the_steady_state_law(beta, gain):
    """Errors of past steps decay with β, so they add up to 1/√(1-β²) of one."""
    codec = nj.Int8(128)
    x = jax.random.normal(jax.random.key(0), (300, 16, 256))

    def step(carry, g):
        exact, stored = carry
        exact = beta * exact + (1 - beta) * g
        stored = codec.encode(beta * codec.decode(stored, 256) + (1 - beta) * g)
        error = jnp.linalg.norm(codec.decode(stored, 256) - exact)
        once = jnp.linalg.norm(codec.decode(codec.encode(exact), 256) - exact)
        return (exact, stored), (error, once)

    start = (jnp.zeros((16, 256)), codec.encode(jnp.zeros((16, 256))))
    _, (error, once) = jax.lax.scan(step, start, x)
    measured = error[100:].mean() / once[100:].mean()
    assert measured == pytest.approx(gain, rel=0.1)
