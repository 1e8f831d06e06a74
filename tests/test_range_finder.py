"""Laws of the randomised range finder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from nanochat_jax.numerics import range_basis


def gaussian(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


SPECTRA = {
    "gaussian": gaussian(24, 64),
    "decaying": helpers.matrix_with_spectrum((24, 64), 1 / np.arange(1, 25)),
    "rank one": helpers.matrix_with_spectrum((24, 64), [3.0]),
    "orthogonal": helpers.matrix_with_spectrum((24, 64), np.ones(24)),
    "zero": jnp.zeros((24, 64)),
}


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("rank", [6, 23, 24])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_basis_is_orthonormal_whatever_the_matrix(name, rank, aligned):
    x = SPECTRA[name]
    x = jnp.stack([1e-30 * x, x, 1e30 * x])
    p = range_basis(x, rank, 0, aligned=aligned)
    helpers.assert_close(p.mT @ p, jnp.broadcast_to(jnp.eye(rank), (3, rank, rank)))


@pytest.mark.parametrize("rank", [200, 256])
@pytest.mark.parametrize("aligned", [False, True])
def test_the_basis_of_most_of_a_space_is_orthonormal_too(aligned, rank):
    """A sketch of all of a space is nearly singular, by chance as far as 1e-11."""
    k = np.arange(256)
    spectra = (k < 5, 2.0 ** (-k / 4), 10.0 ** -(k // 50))
    x = jnp.stack(
        [
            helpers.matrix_with_spectrum((256, 300), spectrum.astype(np.float64))
            for spectrum in spectra
        ]
    )
    for seed in range(3 if aligned else 12):  # `eigh` is slow
        p = range_basis(x, rank, seed, aligned=aligned)
        eye = jnp.broadcast_to(jnp.eye(rank), (3, rank, rank))
        helpers.assert_close(p.mT @ p, eye, atol=2e-5)


def test_the_basis_of_a_small_matrix_does_not_depend_on_rounding():
    """A sketch of signs is singular for one seed in fifty of this size."""
    x = helpers.matrix_with_spectrum((8, 24), 2.0 ** -np.arange(8))
    moved = x * (1 + 1e-6 * gaussian(8, 24, seed=1))
    seeds = range(200)
    bases = [np.stack([range_basis(y, 5, seed) for seed in seeds]) for y in (x, moved)]
    overlap = np.linalg.svd(bases[0].swapaxes(1, 2) @ bases[1], compute_uv=False)
    assert overlap.min() > 0.999


def test_the_basis_spans_an_exactly_low_rank_matrix():
    x = gaussian(2, 24, 4) @ gaussian(2, 4, 64, seed=1)
    p = range_basis(x, 4, 2)
    helpers.assert_close(p @ (p.mT @ x), x, atol=1e-4)


@pytest.mark.parametrize(
    ("power_iterations", "least"), [(1, 0.90), (2, 0.97), (3, 0.985), (4, 0.99)]
)
def test_captured_energy_is_near_that_of_the_exact_decomposition(
    power_iterations, least
):
    spectrum = np.arange(1, 129) ** -0.5
    x = helpers.matrix_with_spectrum((128, 160), spectrum)
    p = range_basis(x, 32, 0, power_iterations=power_iterations)
    captured = jnp.sum((p.mT @ x) ** 2) / np.sum(spectrum[:32] ** 2)
    assert least < captured <= 1 + 1e-5


def test_an_unaligned_basis_spans_as_good_a_space():
    x = helpers.matrix_with_spectrum((128, 160), np.arange(1, 129) ** -0.5)
    energy = lambda aligned: jnp.sum(
        (range_basis(x, 32, 0, aligned=aligned).mT @ x) ** 2
    )
    np.testing.assert_allclose(energy(False), energy(True), rtol=1e-3)


def test_leading_directions_come_first():
    x = helpers.matrix_with_spectrum((24, 64), 2.0 ** -np.arange(24))
    p = range_basis(x, 6, 0, power_iterations=4)
    energies = jnp.linalg.norm(p.mT @ x, axis=-1)
    np.testing.assert_allclose(energies, 2.0 ** -np.arange(6), rtol=1e-3)
