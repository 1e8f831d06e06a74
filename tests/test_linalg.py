"""What the mathematics of Newton-Schulz and of the range finder promises."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
import nanochat_jax as nj
from nanochat_jax.numerics import (
    polar,
    range_finder,
    symmetric,
)

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
    o = polar.newton_schulz(gaussian(*shape), dtype=dtype)
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
    o = polar.newton_schulz(g, polar.QUINTIC.take(steps), dtype=dtype)
    assert jnp.sum(g * o) > 0
    assert jnp.linalg.svdvals(o).max() < 1.5


def test_it_is_near_the_polar_factor():
    g = SPECTRA["gaussian"]
    u, _, vt = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    cosine = np.sum(u @ vt * polar.newton_schulz(g)) / 24
    assert 0.8 < cosine < 1.1


def test_it_commutes_with_isometries():
    p = jnp.linalg.qr(gaussian(64, 8)).Q
    x = gaussian(8, 96, seed=1)
    # Rounding errors in the null space of `p @ x` grow by 3.4445⁵ = 485.
    atol = 485 * jnp.finfo("float32").eps
    helpers.assert_close(
        polar.newton_schulz(p @ x), p @ polar.newton_schulz(x), atol=atol
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_it_commutes_with_transposition(shape):
    x = gaussian(*shape)
    helpers.assert_close(polar.newton_schulz(x.mT), polar.newton_schulz(x).mT)


def test_a_stack_is_its_matrices():
    x = gaussian(3, 16, 24)
    loop = jnp.stack([polar.newton_schulz(m) for m in x])
    helpers.assert_close(polar.newton_schulz(x), loop, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_changes_nothing(scale, dtype):
    # A power of two would be exact; this is exact but for rounding of the input.
    x = gaussian(16, 24)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    a = polar.newton_schulz(x * scale, dtype=dtype)
    helpers.assert_close(a, polar.newton_schulz(x, dtype=dtype), atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_stays_zero(dtype):
    assert not polar.newton_schulz(jnp.zeros((2, 4, 8)), dtype=dtype).any()


def test_bfloat16_input_comes_back_bfloat16():
    x = gaussian(8, 16).astype(jnp.bfloat16)
    assert polar.newton_schulz(x).dtype == jnp.bfloat16


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("rank", [6, 23, 24])
@pytest.mark.parametrize("name", [*SPECTRA, "zero"])
def test_the_basis_is_orthonormal_whatever_the_matrix(name, rank, aligned):
    x = SPECTRA.get(name, jnp.zeros((24, 64)))
    x = jnp.stack([1e-30 * x, x, 1e30 * x])
    p = range_finder.range_basis(x, rank, 0, aligned=aligned)
    helpers.assert_close(p.mT @ p, jnp.broadcast_to(jnp.eye(rank), (3, rank, rank)))


@pytest.mark.parametrize("rank", [200, 256])
@pytest.mark.parametrize("aligned", [False, True])
def test_the_basis_of_most_of_a_space_is_orthonormal_too(aligned, rank):
    """A sketch of all of a space is nearly singular, by chance as far as 1e-11."""
    k = np.arange(256)
    for spectrum in (k < 5, 2.0 ** (-k / 4), 10.0 ** -(k // 50)):
        x = helpers.matrix_with_spectrum((256, 300), spectrum.astype(np.float64))
        for seed in range(12):
            p = range_finder.range_basis(x, rank, seed, aligned=aligned)
            helpers.assert_close(p.mT @ p, jnp.eye(rank), atol=2e-5)


def test_the_basis_of_a_small_matrix_hangs_on_no_last_digit():
    """A sketch of signs is singular for one seed in fifty of this size."""
    x = helpers.matrix_with_spectrum((8, 24), 2.0 ** -np.arange(8))
    moved = x * (1 + 1e-6 * gaussian(8, 24, seed=1))
    seeds = range(200)
    bases = [
        np.stack([range_finder.range_basis(y, 5, seed) for seed in seeds])
        for y in (x, moved)
    ]
    overlap = np.linalg.svd(bases[0].swapaxes(1, 2) @ bases[1], compute_uv=False)
    assert overlap.min() > 0.999


def test_the_basis_spans_an_exactly_low_rank_matrix():
    x = gaussian(2, 24, 4) @ gaussian(2, 4, 64, seed=1)
    p = range_finder.range_basis(x, 4, 2)
    helpers.assert_close(p @ (p.mT @ x), x, atol=1e-4)


@pytest.mark.parametrize(
    ("power_steps", "least"), [(1, 0.90), (2, 0.97), (3, 0.985), (4, 0.99)]
)
def test_captured_energy_is_near_that_of_the_exact_decomposition(power_steps, least):
    spectrum = np.arange(1, 129) ** -0.5
    x = helpers.matrix_with_spectrum((128, 160), spectrum)
    p = range_finder.range_basis(x, 32, 0, power_steps=power_steps)
    captured = jnp.sum((p.mT @ x) ** 2) / np.sum(spectrum[:32] ** 2)
    assert least < captured <= 1 + 1e-5


def test_an_unaligned_basis_spans_as_good_a_space():
    x = helpers.matrix_with_spectrum((128, 160), np.arange(1, 129) ** -0.5)
    energy = lambda aligned: jnp.sum(
        (range_finder.range_basis(x, 32, 0, aligned=aligned).mT @ x) ** 2
    )
    np.testing.assert_allclose(energy(False), energy(True), rtol=1e-3)


def test_leading_directions_come_first():
    x = helpers.matrix_with_spectrum((24, 64), 2.0 ** -np.arange(24))
    p = range_finder.range_basis(x, 6, 0, power_steps=4)
    energies = jnp.linalg.norm(p.mT @ x, axis=-1)
    np.testing.assert_allclose(energies, 2.0 ** -np.arange(6), rtol=1e-3)


METHODS = nj.POLYNOMIALS
# Least and largest output for singular values in [0.1, 1], in exact arithmetic.
BANDS = {
    "quintic": (0.68, 1.14),
    "you": (0.97, 1.04),
    "polar_express_5": (0.85, 1.15),
    "polar_express_8": (0.99, 1.01),
    "aol": (0.94, 1.06),
    "cans": (0.88, 1.13),
}


@pytest.mark.parametrize("name", METHODS)
def test_polynomials_keep_the_band_they_are_published_with(name):
    s = np.geomspace(0.1, 1, 1001) / METHODS[name].margin
    for a, b, c in METHODS[name].coefficients:
        s = a * s + b * s**3 + c * s**5
    low, high = BANDS[name]
    assert low < s.min()
    assert s.max() < high


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_and_number_of_steps_descends(name, dtype):
    for steps in range(1, len(METHODS[name].coefficients) + 1):
        polynomials = METHODS[name].take(steps)
        for g in SPECTRA.values():
            o = polar.newton_schulz(g, polynomials, dtype=dtype, form="standard")
            assert jnp.sum(g * o) > 0
    for g in SPECTRA.values():
        o = polar.newton_schulz(g, METHODS[name], dtype=dtype)
        assert jnp.linalg.svdvals(o).max() < 1.5


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", METHODS)
def test_the_gram_form_is_the_standard_form(name, spectrum):
    for g in (SPECTRA[spectrum], SPECTRA[spectrum].mT):
        standard = polar.newton_schulz(g, METHODS[name], form="standard")
        gram = polar.newton_schulz(g, METHODS[name], form="gram")
        error = jnp.linalg.norm(gram - standard) / jnp.linalg.norm(standard)
        assert error < 5e-4


def test_the_gram_form_restarts_in_float16():
    g = SPECTRA["gaussian"]
    standard = polar.newton_schulz(g, form="standard")
    gram = polar.newton_schulz(g, dtype="float16", form="gram")
    assert jnp.linalg.norm(gram - standard) / jnp.linalg.norm(standard) < 0.02


def test_the_gram_form_refuses_bfloat16():
    with pytest.raises(ValueError, match=r"float32 or float16, got bfloat16"):
        polar.newton_schulz(SPECTRA["gaussian"], dtype="bfloat16", form="gram")
    with pytest.raises(ValueError, match=r"float32 or float16, got bfloat16"):
        nj.orthogonalize(dtype="bfloat16", form="gram")


def test_auto_takes_the_form_with_fewer_operations():
    for shape in [(64, 64), (64, 95), (64, 97), (256, 64), (3, 64, 256)]:
        flops = {
            form: polar.newton_schulz_flops(shape, form=form)
            for form in ("standard", "gram")
        }
        chosen = polar.resolve_form(shape, "float32")
        short, long = sorted(shape[-2:])
        assert chosen == ("gram" if long > 1.5 * short else "standard")
        if long > 1.5 * short:
            assert flops[chosen] == min(flops.values())
        assert polar.resolve_form(shape, "bfloat16") == "standard"


@pytest.fixture
def set_halves_from(monkeypatch):
    """Sets the size from which symmetric products are halved, for all that follows."""

    def set_to(size):
        monkeypatch.setattr(symmetric, "HALVES_FROM", size)
        polar._newton_schulz.clear_cache()

    yield set_to
    monkeypatch.undo()
    polar._newton_schulz.clear_cache()


@pytest.mark.parametrize("halves_from", [8, 1000])
@pytest.mark.parametrize("name", ["quintic", "aol"])
@pytest.mark.parametrize("form", ["standard", "gram"])
def test_operations_are_those_of_the_products(name, form, halves_from, set_halves_from):
    set_halves_from(halves_from)
    options = {"polynomials": METHODS[name], "form": form}
    step = lambda x: polar.newton_schulz(x, **options)
    counted = helpers.count_product_flops(step, jnp.zeros((3, 16, 64)))
    assert counted == polar.newton_schulz_flops((3, 16, 64), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(2, 15, 24), (24, 15)])
def test_halves_of_symmetric_matrices_are_enough(shape, form, dtype, set_halves_from):
    if (form, dtype) == ("gram", "bfloat16"):
        dtype = "float16"
    x = gaussian(*shape)
    whole = polar.newton_schulz(x, dtype=dtype, form=form)
    set_halves_from(8)
    halves = polar.newton_schulz(x, dtype=dtype, form=form)
    tolerance = 1e-5 if dtype == "float32" else 0.02
    helpers.assert_close(halves, whole, atol=tolerance)


def test_bfloat16_products_are_rounded_on_accelerators_only(monkeypatch):
    x = jnp.ones((2, 2), jnp.bfloat16)
    result = lambda x: symmetric.product("ij,jk->ik", x, x).dtype
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert result(x) == result(x.astype("float16")) == jnp.float32
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert result(x) == jnp.bfloat16
    assert result(x.astype("float16")) == result(x.astype("float32")) == jnp.float32


def test_devices_add_up_gram_matrices_in_float32(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    polar._newton_schulz.clear_cache()
    step = jax.shard_map(
        lambda x: polar.newton_schulz(x, dtype="bfloat16", axis_name=("d",)),
        mesh=jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=jax.P(None, "d"),
        out_specs=jax.P(None, "d"),
    )
    program = str(jax.make_jaxpr(step)(gaussian(8, 16)))
    monkeypatch.undo()
    polar._newton_schulz.clear_cache()
    sums = re.findall(r"(\w+)\[.*\] = psum", program)
    assert "f32" in sums
    assert "bf16" not in sums


@helpers.on_processors
@pytest.mark.parametrize("name", METHODS)
def test_rounding_products_to_bfloat16_loses_little(name, monkeypatch):
    x = gaussian(24, 40)
    u, _, v = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)

    def error():
        polar._newton_schulz.clear_cache()
        y = polar.newton_schulz(x, METHODS[name], dtype="bfloat16")
        return np.linalg.norm(y - u @ v) / np.linalg.norm(u @ v)

    whole = error()
    # Compilers for processors take two casts, to and fro, for none.
    rounded = lambda *args: jax.lax.reduce_precision(symmetric.product(*args), 8, 7)
    monkeypatch.setattr(polar, "product", rounded)
    monkeypatch.setattr(
        polar, "gram", lambda x: symmetric.halve(rounded("...ik,...jk->...ij", x, x))
    )
    assert whole != error() < whole + 0.02
    monkeypatch.undo()
    polar._newton_schulz.clear_cache()


def test_a_sequence_says_how_many_steps_it_has():
    assert len(METHODS["quintic"].take(7).coefficients) == 7
    assert METHODS["polar_express_8"].take(10).coefficients[-1] == (1.875, -1.25, 0.375)
    with pytest.raises(ValueError, match="at most 5 steps, got 6"):
        METHODS["you"].take(6)


@helpers.on_processors
def test_the_precision_is_that_of_the_machine(monkeypatch):
    assert polar.resolve_dtype("float32") == "float32"
    for flags, expected in [("fma avx512_bf16", "bfloat16"), ("fma avx2", "float32")]:
        read = lambda *_, flags=flags, **__: f"flags : {flags}\n"
        monkeypatch.setattr(polar.Path, "read_text", read)
        assert polar.resolve_dtype() == expected
