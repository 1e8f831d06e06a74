"""Laws of Zolotarev's fractions, and of the inverses they are made of."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import helpers
import nanochat_jax as nj
from nanochat_jax import numerics
from nanochat_jax.numerics import inverse, zolotarev
from nanochat_jax.numerics.symmetric import Products
from nanochat_jax.polynomials import ZOLOTAREV, Fractions

LOW = {2: 3e-3, 3: 5e-3, 4: 7e-3}
BAND = {2: 0.13, 3: 0.023, 4: 0.004}
SPECTRUM = [1.0, 0.8, 0.3, 0.1, 0.05, 0.02, 0.01, 8e-3]


def value(fractions: Fractions, x: np.ndarray) -> np.ndarray:
    return x * (fractions.constant + sum(w / (x**2 + c) for w, c in fractions.terms))


@pytest.mark.parametrize("poles", ZOLOTAREV)
def test_the_poles_are_those_of_elliptic_functions(poles):
    low = LOW[poles]
    quarter = scipy.special.ellipkm1(low**2)
    points = np.arange(1, 2 * poles + 1) * quarter / (2 * poles + 1)
    sn, cn, _, _ = scipy.special.ellipj(points, 1 - low**2)
    odd = (low * sn / cn)[::2] ** 2
    shifts = [shift for _, shift in ZOLOTAREV[poles].terms]
    np.testing.assert_allclose(shifts, odd, rtol=1e-9)


@pytest.mark.parametrize("poles", ZOLOTAREV)
def test_the_error_is_as_large_at_each_extremum(poles):
    """Chebyshev's mark of the best approximation: one more than there are numbers."""
    x = np.geomspace(LOW[poles], 1, 100_001)
    error = value(ZOLOTAREV[poles], x) - 1
    signs = np.flatnonzero(np.diff(np.sign(error)))
    peaks = [max(part, key=abs) for part in np.split(error, signs + 1)]
    assert len(peaks) == 2 * poles + 2
    np.testing.assert_allclose(np.abs(peaks), abs(peaks[0]), rtol=1e-4)
    assert abs(peaks[0]) < BAND[poles]


@pytest.mark.parametrize("poles", ZOLOTAREV)
@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_singular_values_end_in_the_band(shape, poles):
    x = helpers.matrix_with_spectrum(shape, SPECTRUM)
    o = zolotarev(x, ZOLOTAREV[poles])
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    wanted = value(ZOLOTAREV[poles], s / np.sum(s**4) ** 0.25)
    helpers.assert_close(o, jnp.float32(u * wanted @ vt), atol=2e-3)
    assert abs(jnp.linalg.svdvals(o) - 1).max() < BAND[poles] + 2e-3


def test_singular_vectors_scale_and_batch_do_not_matter():
    x = jnp.stack([helpers.matrix_with_spectrum((8, 24), SPECTRUM, i) for i in (0, 1)])
    p = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (24, 8)))[0]
    o = zolotarev(x)
    close = lambda found, wanted: helpers.assert_close(found, wanted, atol=1e-3)
    close(zolotarev(p @ x), p @ o)
    close(zolotarev(x.mT), o.mT)
    close(zolotarev(x[1]), o[1])
    for scale in (1e-30, 1e30):
        close(zolotarev(scale * x), o)


@pytest.mark.parametrize("noise", [1e-6, 1e-3, 1e-2])
def test_one_large_direction_keeps_its_place(noise):
    """Elimination without a Cholesky factor had up to 14 in place of 1, of 600 rows."""
    left, right, rest = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(200, 1), (1, 200), (200, 200)])
    )
    x = left @ right + noise * rest
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64))
    s /= np.sum(s**4) ** 0.25
    for fractions in ZOLOTAREV.values():
        error = zolotarev(x, fractions) - u * value(fractions, s) @ vt
        assert np.linalg.norm(error, 2) < 0.02


def test_zero_stays_zero_and_types_stay():
    x = jnp.zeros((2, 8, 24), jnp.bfloat16)
    o = zolotarev(x)
    assert o.dtype == x.dtype
    assert not o.any()


SIZES = [1, 2, 8, 9, 30, 100]
"""One row, one block, blocks that do not fill it, and two kinds of block."""


@pytest.mark.parametrize("halved_from", [(), (16, 30)])
@pytest.mark.parametrize("size", SIZES)
def test_an_inverse_is_that_of_numpy(size, halved_from, monkeypatch):
    monkeypatch.setattr(inverse, "HALVED_FROM", halved_from)
    x = jax.random.normal(jax.random.key(size), (2, size, 2 * size))
    a = x @ x.mT / jnp.linalg.norm(x @ x.mT, axis=(-2, -1), keepdims=True)
    a += 3.5e-6 * jnp.eye(size)[None]
    wanted = np.linalg.inv(np.asarray(a, np.float64))
    found = inverse.inverse(a)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * abs(wanted).max())


@pytest.mark.parametrize("size", SIZES)
def test_operations_of_an_inverse_are_those_of_its_products(size, monkeypatch):
    monkeypatch.setattr(inverse, "HALVED_FROM", (16, 30))
    counted = helpers.count_product_flops(inverse.inverse, jnp.eye(size))
    assert counted == inverse.inverse_flops(size)


@pytest.mark.parametrize("poles", ZOLOTAREV)
def test_operations_are_those_of_the_products(poles):
    fractions, products = ZOLOTAREV[poles], Products(8)
    step = lambda x: zolotarev(x, fractions, products=products)
    counted = helpers.count_product_flops(step, jnp.zeros((3, 16, 64)))
    known = numerics.zolotarev_flops((3, 16, 64), fractions, products=products)
    assert counted == known


@pytest.mark.parametrize("shape", [(768, 768), (768, 2064), (2048, 8192)])
def test_it_takes_half_of_the_operations_of_the_quintic(shape):
    quintic = numerics.newton_schulz_flops(shape)
    assert numerics.zolotarev_flops(shape) < quintic / 2


def test_no_part_of_it_is_left_to_a_library():
    """Whose calls beside other work may wait for ever on few cores."""
    program = jax.jit(zolotarev).lower(jnp.ones((16, 24))).as_text()
    assert "while" in program
    assert "custom_call" not in program


PARAMS = {"up": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}


@pytest.mark.parametrize("wrapped", [{}, {"bits": 8, "min_size": 1}, {"rank": 2}])
def test_muon_takes_two_poles_by_itself(wrapped):
    grads = {"up": {"kernel": jnp.eye(4, 8) + 0.1, "bias": jnp.ones(8)}}

    def update(**kwargs):
        tx = nj.muon(0.02, ns_method="zolotarev", **wrapped, **kwargs)
        return tx.update(grads, tx.init(PARAMS), PARAMS)[0]["up"]["kernel"]

    two, three = update(), update(ns_steps=3)
    helpers.assert_close(two, update(ns_steps=2), atol=0, rtol=0)
    assert 1e-4 < jnp.linalg.norm(two - three) / jnp.linalg.norm(three) < 0.2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "`ns_steps` must be one of [2, 3, 4], the poles it may have, for"),
        ({"ns_steps": 2, "ns_dtype": "bfloat16"}, '`ns_dtype = "bfloat16"` is for'),
    ],
)
def test_settings_that_it_has_not_are_refused(settings, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        nj.OptimizerConfig(ns_method="zolotarev", **settings)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"form": "gram"}])
def test_orthogonalize_refuses_what_fractions_do_not_have(options):
    with pytest.raises(ValueError, match="must be float32 for fractions"):
        nj.orthogonalize(ZOLOTAREV[2], **options)


@pytest.mark.parametrize("x64", [False, True])
def test_types_are_kept_where_none_may_change(x64):
    x = jax.random.normal(jax.random.key(0), (16, 24), jnp.float32)
    with jax.numpy_dtype_promotion("strict"), jax.enable_x64(x64):
        assert zolotarev(x).dtype == jnp.float32
