"""Hashed positions pass for random numbers where they are used as such."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.numerics import hashing

SHAPE = (64, 1000)
COUNT = 64_000


def key(*words):
    return jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32), impl="threefry2x32")


def correlation(x, y):
    """In standard deviations: of independent numbers below 4, but once in 16,000."""
    return abs(np.corrcoef(np.ravel(x), np.ravel(y))[0, 1]) * np.sqrt(np.size(x))


@pytest.mark.parametrize("words", [(0, 0), (0, 1), (7, 123_456_789)])
def test_numbers_are_even_and_neighbours_independent(words):
    x = np.asarray(hashing.uniform(key(*words), SHAPE))
    assert x.min() >= 0
    assert x.max() < 1
    found, _ = np.histogram(x, bins=64, range=(0, 1))
    expected = COUNT / 64
    chi_squared = np.sum((found - expected) ** 2 / expected)  # 63 ± 11.2
    assert 20 < chi_squared < 110
    for lag in (1, 2, 3, 1000):
        flat = x.ravel()
        assert correlation(flat[lag:], flat[:-lag]) < 4


def test_steps_and_leaves_have_numbers_of_their_own():
    keys = [key(count, name) for count in (0, 1, 2, 1000) for name in (5, 6, 1 << 31)]
    drawn = [hashing.uniform(k, SHAPE) for k in keys]
    for x, y in itertools.combinations(drawn, 2):
        assert correlation(x, y) < 4.5


def test_every_kind_of_key_will_do():
    for impl in ("threefry2x32", "rbg"):
        x = hashing.uniform(jax.random.key(0, impl=impl), SHAPE)
        assert abs(float(x.mean()) - 0.5) < 4 * np.sqrt(1 / 12 / COUNT)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_symmetric_numbers_have_mean_zero_and_variance_one(seed):
    x = np.asarray(hashing.symmetric(jnp.uint32(seed), SHAPE))
    assert abs(x).max() <= np.float32(3**0.5)
    assert abs(x.mean()) < 4 / np.sqrt(COUNT)
    assert abs(x.var() - 1) < 4 / np.sqrt(COUNT)
    assert correlation(x[1:], x[:-1]) < 4


def test_numbers_do_not_hang_on_how_axes_are_cut():
    whole = hashing.uniform(key(1, 2), (6, 4, 10))
    chex.assert_trees_all_equal(
        whole.reshape(24, 10), hashing.uniform(key(1, 2), (24, 10))
    )
    assert hashing.uniform(key(1, 2), ()).shape == ()


def test_different_hashes_for_different_integers():
    x = jnp.arange(1 << 16, dtype=jnp.uint32) * jnp.uint32(40_503)
    assert len(np.unique(hashing.mix_bits(x))) == len(x)
