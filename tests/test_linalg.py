"""What the mathematics of Newton-Schulz and of the range finder promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from nanochat_jax import linalg

SHAPES = [(16, 48), (48, 16), (32, 32), (2, 16, 48)]
DTYPES = ["float32", "bfloat16"]


def gaussian(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


SPECTRA = {
    "gaussian": gaussian(24, 64),
    "decaying": helpers.matrix_with_spectrum((24, 64), 1 / np.arange(1, 25)),
    "rank one": helpers.matrix_with_spectrum((24, 64), [3.0]),
    "orthogonal": helpers.matrix_with_spectrum((24, 64), np.ones(24)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_end_in_the_band_of_the_quintic(shape, dtype):
    o = linalg.newton_schulz(gaussian(*shape), dtype=dtype)
    s = jnp.linalg.svdvals(o)
    # [0.68, 1.20] on [1e-3, 1] in exact arithmetic; bfloat16 adds about 0.01. The
    # square Gaussian has a singular value near zero, which five steps do not lift.
    assert s.max() < 1.22
    assert s.min() > (0.65 if shape != (32, 32) else 0.2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_update_descends_and_stays_bounded(name, steps, dtype):
    g = SPECTRA[name]
    o = linalg.newton_schulz(g, linalg.QUINTIC[:steps], dtype=dtype)
    assert jnp.sum(g * o) > 0
    assert jnp.linalg.svdvals(o).max() < 1.5


def test_it_is_near_the_polar_factor():
    g = SPECTRA["gaussian"]
    u, _, vt = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    cosine = np.sum(u @ vt * linalg.newton_schulz(g)) / 24
    assert 0.8 < cosine < 1.1


def test_it_commutes_with_isometries():
    p = jnp.linalg.qr(gaussian(64, 8)).Q
    x = gaussian(8, 96, seed=1)
    helpers.assert_close(linalg.newton_schulz(p @ x), p @ linalg.newton_schulz(x))


@pytest.mark.parametrize("shape", SHAPES)
def test_it_commutes_with_transposition(shape):
    x = gaussian(*shape)
    helpers.assert_close(linalg.newton_schulz(x.mT), linalg.newton_schulz(x).mT)


def test_a_stack_is_its_matrices():
    x = gaussian(3, 16, 24)
    loop = jnp.stack([linalg.newton_schulz(m) for m in x])
    helpers.assert_close(linalg.newton_schulz(x), loop, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_changes_nothing(scale, dtype):
    # A power of two would be exact; this is exact but for rounding of the input.
    x = gaussian(16, 24)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    a = linalg.newton_schulz(x * scale, dtype=dtype)
    helpers.assert_close(a, linalg.newton_schulz(x, dtype=dtype), atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_stays_zero(dtype):
    assert not linalg.newton_schulz(jnp.zeros((2, 4, 8)), dtype=dtype).any()


def test_bfloat16_input_comes_back_bfloat16():
    x = gaussian(8, 16).astype(jnp.bfloat16)
    assert linalg.newton_schulz(x).dtype == jnp.bfloat16


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("name", [*SPECTRA, "zero"])
def test_the_basis_is_orthonormal_whatever_the_matrix(name, scale):
    x = SPECTRA.get(name, jnp.zeros((24, 64))) * scale
    p = linalg.range_basis(x, 6, jax.random.key(0))
    helpers.assert_close(p.mT @ p, jnp.eye(6))


def test_the_basis_spans_an_exactly_low_rank_matrix():
    x = gaussian(2, 24, 4) @ gaussian(2, 4, 64, seed=1)
    p = linalg.range_basis(x, 4, jax.random.key(2))
    helpers.assert_close(p @ (p.mT @ x), x, atol=1e-4)


@pytest.mark.parametrize(("power_steps", "least"), [(0, 0.80), (1, 0.96), (2, 0.985)])
def test_captured_energy_is_near_that_of_the_exact_decomposition(power_steps, least):
    spectrum = np.arange(1, 129) ** -0.5
    x = helpers.matrix_with_spectrum((128, 160), spectrum)
    p = linalg.range_basis(x, 32, jax.random.key(0), power_steps=power_steps)
    captured = jnp.sum((p.mT @ x) ** 2) / np.sum(spectrum[:32] ** 2)
    assert least < captured <= 1 + 1e-5


def test_leading_directions_come_first():
    x = helpers.matrix_with_spectrum((24, 64), 2.0 ** -np.arange(24))
    p = linalg.range_basis(x, 6, jax.random.key(0))
    energies = jnp.linalg.norm(p.mT @ x, axis=-1)
    np.testing.assert_allclose(energies, 2.0 ** -np.arange(6), rtol=1e-3)
