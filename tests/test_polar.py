"""Laws of Newton-Schulz iteration, and the operations it takes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
import nanochat_jax as nj
from nanochat_jax.numerics import Products, forms, polar, symmetric

SHAPES = [(16, 48), (48, 16), (32, 32), (2, 16, 48)]
DTYPES = ["float32", "bfloat16"]


def gaussian(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


# Gaussian, decaying, of rank one, orthogonal: one stack, for one compilation.
SPECTRA = jnp.stack(
    [
        gaussian(24, 64),
        helpers.matrix_with_spectrum((24, 64), 1 / np.arange(1, 25)),
        helpers.matrix_with_spectrum((24, 64), [3.0]),
        helpers.matrix_with_spectrum((24, 64), np.ones(24)),
    ]
)
METHODS = nj.POLYNOMIALS


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
@pytest.mark.parametrize("name", METHODS)
def test_the_update_descends_and_stays_bounded(name, dtype):
    o = polar.newton_schulz(SPECTRA, METHODS[name], dtype=dtype, form="standard")
    assert (jnp.sum(SPECTRA * o, axis=(1, 2)) > 0).all()
    assert jnp.linalg.svdvals(o).max() < 1.5


def test_it_is_near_the_polar_factor():
    g = SPECTRA[0]
    u, _, vt = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    cosine = np.sum(u @ vt * polar.newton_schulz(SPECTRA)[0]) / 24
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


# Least and largest output for singular values in [0.1, 1], in exact arithmetic.
BANDS = {
    "quintic": (0.68, 1.14),
    "you": (0.97, 1.04),
    "polar_express_5": (0.85, 1.15),
    "polar_express_8": (0.99, 1.01),
    "aol": (0.94, 1.06),
    "cans": (0.88, 1.13),
    "cubic": (0.77, 1.31),
    "deepseek_v4": (0.999, 1.001),
}


@pytest.mark.parametrize("name", METHODS)
def test_polynomials_keep_the_band_they_are_published_with(name):
    s = np.geomspace(0.1, 1, 1001) / METHODS[name].margin
    for a, b, c in METHODS[name].coefficients:
        s = a * s + b * s**3 + c * s**5
    low, high = BANDS[name]
    assert low < s.min()
    assert s.max() < high


@pytest.mark.parametrize("name", METHODS)
def test_every_number_of_steps_descends(name):
    s = values = np.geomspace(1e-3, 1, 1001) / METHODS[name].margin
    for a, b, c in METHODS[name].coefficients:
        values = a * values + b * values**3 + c * values**5
        assert (s * values > 0).all()


def agree(g, polynomials):
    """Whether the forms agree but for rounding errors, which steps raise by all `a`."""
    growth = np.prod([a for a, _, _ in polynomials.coefficients])
    bound = max(5e-4, growth * jnp.finfo("float32").eps)
    standard, gram = (
        polar.newton_schulz(g, polynomials, form=form) for form in ("standard", "gram")
    )
    norm = lambda x: jnp.linalg.norm(x, axis=(-2, -1))
    return (norm(gram - standard) < bound * norm(standard)).all()


@pytest.mark.parametrize("name", METHODS)
def test_the_gram_form_is_the_standard_form(name):
    assert agree(SPECTRA, METHODS[name])


@pytest.mark.parametrize("name", ["quintic", "aol"])
def test_the_gram_form_of_tall_matrices_is_the_standard_form(name):
    assert agree(SPECTRA.mT, METHODS[name])


@pytest.mark.parametrize("name", METHODS)
def test_wide_matrices_are_iterated_on_in_float32(name):
    """They are as exact as in float32, whatever the condition of the matrix."""
    spectra = [np.geomspace(1, 1 / condition, 8) for condition in (1e3, 1e5, 1e7)]
    x = jnp.stack([helpers.matrix_with_spectrum((8, 64), s) for s in spectra])
    exact, chosen, short = (
        polar.newton_schulz(
            x, METHODS[name], dtype=dtype, products=Products(99, wide_ratio=r)
        )
        for dtype, r in (("float32", 5.0), ("bfloat16", 5.0), ("bfloat16", np.inf))
    )
    helpers.assert_close(chosen, exact)
    standard = polar.newton_schulz(x, METHODS[name], form="standard")
    error = lambda y: jnp.linalg.norm(y - standard, axis=(1, 2))
    assert (error(chosen) < 2e-3).all()
    assert (error(chosen) < 0.1 * error(short)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_gram_form_refuses_short_types(dtype):
    for call in (
        lambda: polar.newton_schulz(SPECTRA, dtype=dtype, form="gram"),
        lambda: nj.orthogonalize(dtype=dtype, form="gram"),
    ):
        with pytest.raises(ValueError, match=f"needs float32, got {dtype}"):
            call()


def test_the_gram_form_asks_for_float32_where_no_type_is_given():
    params = {"a": jnp.ones((4, 8))}
    tx = nj.orthogonalize(form="gram")
    tx.update(params, tx.init(params))


def test_auto_takes_the_form_with_fewer_operations():
    for shape in [(64, 64), (64, 95), (64, 97), (256, 64), (3, 64, 256)]:
        flops = {
            form: polar.newton_schulz_flops(shape, form=form)
            for form in ("standard", "gram")
        }
        chosen = forms.resolve_form(shape, "float32")
        short, long = sorted(shape[-2:])
        assert chosen == ("gram" if long > 1.5 * short else "standard")
        if long > 1.5 * short:
            assert flops[chosen] == min(flops.values())
        assert forms.resolve_form(shape, "bfloat16") == "standard"


MIXED = nj.Polynomials(((2.0, -1.0, 0.0), (2.0, -1.5, 0.5), (1.5, -0.5, 0.0)))


@pytest.mark.parametrize("form", ["standard", "gram"])
def test_cubic_and_quintic_steps_may_follow_each_other(form):
    u, s, v = np.linalg.svd(np.asarray(SPECTRA[1], np.float64), full_matrices=False)
    s = s / np.linalg.norm(s)
    for a, b, c in MIXED.coefficients:
        s = a * s + b * s**3 + c * s**5
    helpers.assert_close(polar.newton_schulz(SPECTRA, MIXED, form=form)[1], u * s @ v)


@pytest.mark.parametrize(
    ("name", "halves_from"),
    [("quintic", 8), ("aol", 8), ("aol", 1000), ("cubic", 1000), ("mixed", 8)],
)
@pytest.mark.parametrize("form", ["standard", "gram"])
def test_operations_are_those_of_the_products(name, form, halves_from):
    options = {
        "polynomials": MIXED if name == "mixed" else METHODS[name],
        "form": form,
        "products": Products(halves_from),
    }
    step = lambda x: polar.newton_schulz(x, **options)
    counted = helpers.count_product_flops(step, jnp.zeros((3, 16, 64)))
    assert counted == polar.newton_schulz_flops((3, 16, 64), **options)


@pytest.mark.parametrize(
    ("form", "dtype", "tolerance"),
    [
        ("standard", "float32", 1e-5),
        ("standard", "bfloat16", 0.02),
        ("gram", "float32", 1e-5),
    ],
)
@pytest.mark.parametrize("shape", [(2, 15, 24), (24, 15)])
def test_halves_of_symmetric_matrices_are_enough(shape, form, dtype, tolerance):
    whole, halves = (
        polar.newton_schulz(
            gaussian(*shape), dtype=dtype, form=form, products=Products(size)
        )
        for size in (1000, 8)
    )
    helpers.assert_close(halves, whole, atol=tolerance)


def test_processors_halve_products_and_accelerators_round_them(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    for flags, ratio in [("avx512_bf16", 5.0), ("avx512_bf16 amx_bf16", np.inf)]:
        words = frozenset(flags.split())
        monkeypatch.setattr(forms, "_processor_words", lambda words=words: words)
        assert symmetric.products_here() == Products(512, wide_ratio=ratio)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert symmetric.products_here().upper_rows(4096) == 4096
    assert symmetric.products_here().short_results


def test_short_results_are_those_of_bfloat16():
    x = jnp.ones((2, 2), jnp.bfloat16)
    result = lambda short, x: Products(8, short).multiply("ij,jk->ik", x, x).dtype
    assert result(True, x) == jnp.bfloat16
    assert result(False, x) == result(True, x.astype("float32")) == jnp.float32


def test_devices_add_up_gram_matrices_in_float32():
    short = Products(short_results=True)
    step = jax.shard_map(
        lambda x: polar.newton_schulz(
            x, dtype="bfloat16", axis_name=("d",), products=short
        ),
        mesh=jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=jax.P(None, "d"),
        out_specs=jax.P(None, "d"),
    )
    program = str(jax.make_jaxpr(step)(gaussian(8, 16)))
    sums = re.findall(r"(\w+)\[.*\] = psum", program)
    assert "f32" in sums
    assert "bf16" not in sums


@dataclasses.dataclass(frozen=True)
class Rounded(Products):
    """Rounds all products: compilers for processors take two casts for none."""

    def multiply(self, axes, x, y):
        return jax.lax.reduce_precision(super().multiply(axes, x, y), 8, 7)


@helpers.on_processors
@pytest.mark.parametrize("name", METHODS)
def test_rounding_products_to_bfloat16_loses_little(name):
    u, _, v = np.linalg.svd(np.asarray(SPECTRA[0], np.float64), full_matrices=False)

    def error(products):
        y = polar.newton_schulz(
            SPECTRA, METHODS[name], dtype="bfloat16", form="standard", products=products
        )
        return np.linalg.norm(y[0] - u @ v) / np.linalg.norm(u @ v)

    exact = error(None)
    assert exact != error(Rounded(512)) < exact + 0.02


def test_a_sequence_says_how_many_steps_it_has():
    assert len(METHODS["quintic"].take(7).coefficients) == 7
    assert METHODS["polar_express_8"].take(10).coefficients[-1] == (1.875, -1.25, 0.375)
    with pytest.raises(ValueError, match="at most 5 steps, got 6"):
        METHODS["you"].take(6)


@helpers.on_processors
def test_the_precision_is_that_of_the_machine(monkeypatch):
    assert forms.resolve_dtype("float32") == "float32"
    for flags, expected in [("fma avx512_bf16", "bfloat16"), ("fma avx2", "float32")]:
        read = lambda *_, flags=flags, **__: f"flags : {flags}\n"
        monkeypatch.setattr(forms.Path, "read_text", read)
        forms._processor_words.cache_clear()
        assert forms.resolve_dtype() == expected
    forms._processor_words.cache_clear()
