"""Orthogonalisation of bare matrices by Newton-Schulz iteration.

Everything here acts on the last two axes and treats the axes before them as a batch, so
a stack of layers `[layers, m, n]` needs no `vmap`.

Axis letters: `m` rows, `n` columns.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from nanochat_jax.numerics.polynomials import QUINTIC, Coefficients, Polynomials
from nanochat_jax.numerics.symmetric import (
    Halves,
    commuting_product,
    gram,
    halve,
    halves_flops,
    mirror,
    product,
)

Form = Literal["auto", "standard", "gram"]

GRAM_GROWTH = 490.0
"""Most growth of rounding errors in float32 before the Gram form restarts."""

NewtonSchulzDtype = Literal["auto", "float32", "bfloat16", "float16"]

_GramOf = Callable[[Array], Halves]

_NATIVE_BF16 = ("amx_bf16", "avx512_bf16", "bf16")

GRAM_RATIO = 1.5
"""Long side over short side above which the Gram form takes fewer operations."""


def newton_schulz(
    x: Float[Array, "*batch m n"],
    polynomials: Polynomials = QUINTIC,
    *,
    dtype: DTypeLike = jnp.float32,
    form: Form = "auto",
    axis_name: tuple[str, ...] = (),
) -> Float[Array, "*batch m n"]:
    """Returns an approximate polar factor of `x` by Newton-Schulz iteration.

    Each step applies the odd polynomial `aX + b(XXᵀ)X + c(XXᵀ)²X`, which moves every
    singular value towards one and leaves the singular vectors alone. Hence
    `newton_schulz(p @ x) == p @ newton_schulz(x)` for any `p` with orthonormal columns.
    The scale of `x` is divided out in float32 before the cast to `dtype`: gradients of
    1e-30 and of 1e30 give the same result, and a zero matrix gives zero.

    The standard form works on `X` in every step, in `k(4s²l + 2s³)` operations for `k`
    steps, short side `s` and long side `l`. The Gram form (Dao et al. 2026) works on
    `XXᵀ` and multiplies the result into `X`, in `4rs²l + (8k - 6r)s³` if it begins `r`
    times. Products that are symmetric, half of the `4s²l` and all over `s³`, take a
    quarter less where `products` halves them. The Gram form squares the
    condition number, so it needs a long mantissa: in float32 it is the standard form to
    5e-4, in float16 it begins anew after two steps, and in bfloat16 it is refused.

    Example:
      >>> o = newton_schulz(jax.random.normal(jax.random.key(0), (4, 64, 256)))
      >>> o.shape  # singular values of each of the four matrices are near one
      (4, 64, 256)

    Args:
      x: Matrices to orthogonalise.
      polynomials: The polynomials, one for each step, and the scaling they need.
      dtype: Type of the iterate. Products accumulate in float32 whatever it is.
      form: `"standard"`, `"gram"`, or `"auto"` for that with fewer operations of those
        that are safe in `dtype`; see `resolve_form`.
      axis_name: Mesh axes over which the columns are spread, under `jax.shard_map`. No
        matrix may then have more rows than columns in all. Gram matrices are added up
        over these devices, and nothing else of the size of a matrix is sent.

    Returns:
      An array of the shape and type of `x`, with singular values near one.

    Raises:
      ValueError: If `form` is `"gram"` and `dtype` is bfloat16.
    """
    return _newton_schulz(x, polynomials, jnp.dtype(dtype), form, axis_name)


# Traced once for each shape, not once for each of many leaves.
@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _newton_schulz(
    x: Array,
    polynomials: Polynomials,
    dtype: DTypeLike,
    form: Form,
    axis_name: tuple[str, ...],
) -> Array:
    wide = bool(axis_name) or x.shape[-2] <= x.shape[-1]
    gram_of = lambda y: _sum_over(axis_name, gram(y))
    y = normalize(x, polynomials.margin, axis_name).astype(dtype)
    y, known = y if wide else y.mT, None
    if polynomials.rescaling == "aol":
        y, known = _rescale_rows(y, gram_of(y))
    columns = y.shape[-1] * (jax.lax.axis_size(axis_name) if axis_name else 1)
    form = resolve_form((y.shape[-2], columns), dtype, form)
    iterate = _iterate if form == "standard" else _iterate_gram
    y = iterate(y, known, polynomials, gram_of)
    return (y if wide else y.mT).astype(x.dtype)


def resolve_form(
    shape: tuple[int, ...], dtype: DTypeLike, form: Form = "auto"
) -> Literal["standard", "gram"]:
    """Returns which form `newton_schulz` takes for a shape and a type.

    `"auto"` is the Gram form where the long side is over 1.5 times the short one, from
    where on it takes fewer operations, in float32 and float16, and else the standard.

    Raises:
      ValueError: If `form` is `"gram"` and `dtype` is bfloat16.
    """
    precise = jnp.dtype(dtype) in (jnp.float32, jnp.float16, jnp.float64)
    if form == "gram" and not precise:
        raise ValueError(
            f"the Gram form needs float32 or float16, got {jnp.dtype(dtype).name}, in "
            "which its error is larger than its result. Use the standard form."
        )
    if form != "auto":
        return form
    short, long = sorted(shape[-2:])
    return "gram" if precise and long > GRAM_RATIO * short else "standard"


def resolve_dtype(dtype: NewtonSchulzDtype = "auto") -> str:
    """Returns the type in which Newton-Schulz runs on this machine.

    `"auto"` is bfloat16 on accelerators and on processors that multiply it natively
    (AMX or AVX-512 BF16 on x86, BF16 on Arm, as Linux lists them), and float32 on
    others, which emulate it more slowly than they multiply float32.
    """
    if dtype != "auto":
        return dtype
    if jax.default_backend() != "cpu":
        return "bfloat16"
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return "float32"
    return "float32" if words.isdisjoint(_NATIVE_BF16) else "bfloat16"


def newton_schulz_flops(
    shape: tuple[int, ...],
    polynomials: Polynomials = QUINTIC,
    *,
    dtype: DTypeLike = jnp.float32,
    form: Form = "auto",
) -> int:
    """Returns the floating-point operations of the products in `newton_schulz`."""
    short, long = sorted(shape[-2:])
    steps = len(polynomials.coefficients)
    of_long = halves_flops(short, long)
    square = halves_flops(short, short)
    applied = 2 * short**2 * long
    if resolve_form(shape, dtype, form) == "standard":
        return math.prod(shape[:-2]) * steps * (of_long + square + applied)
    starts = len(_segments(polynomials, jnp.dtype(dtype)))
    small = (4 * steps - 3 * starts) * square
    return math.prod(shape[:-2]) * (starts * (of_long + applied) + small)


def _iterate(
    y: Array, known: Halves | None, polynomials: Polynomials, gram_of: _GramOf
) -> Array:
    """Applies the polynomials to `y`, whose Gram matrix may be known."""
    steps = polynomials.coefficients
    if known is not None:
        y, steps = _step(y, steps[0], known), steps[1:]
    if not steps:
        return y
    # A loop: one step to compile, and a layout of `y` that does not change within.
    advance = lambda y, step: (_step(y, step, gram_of(y)), None)
    return jax.lax.scan(advance, y, jnp.asarray(steps, jnp.float32))[0]


def _step(y: Array, coefficients: Coefficients | Array, of_y: Halves) -> Array:
    a, b, c = coefficients
    square = gram(mirror(of_y).astype(y.dtype))
    # Added in float32, whatever the products are rounded to.
    add = lambda b, x, c, z: b * x.astype(jnp.float32) + c * z.astype(jnp.float32)
    factor = jax.tree.map(lambda g, s: add(b, g, c, s).astype(y.dtype), of_y, square)
    applied = product("...ij,...jk->...ik", mirror(factor), y)
    return add(a, y, 1.0, applied).astype(y.dtype)


def _iterate_gram(
    y: Array, known: Halves | None, polynomials: Polynomials, gram_of: _GramOf
) -> Array:
    """Applies the polynomials to `y` through its Gram matrix, which may be known."""
    for steps in _segments(polynomials, y.dtype):
        known = gram_of(y) if known is None else known
        factor = _gram_polynomial(mirror(known).astype(y.dtype), steps)
        y, known = product("...ij,...jk->...ik", factor, y).astype(y.dtype), None
    return y


def _segments(
    polynomials: Polynomials, dtype: DTypeLike
) -> list[tuple[Coefficients, ...]]:
    """Returns the steps between two restarts of the Gram form.

    The product of `a` is what rounding errors of the Gram matrix grow by. In float32
    the quintic's five steps are within the limit, in float16 two steps of any sequence.
    """
    steps = polynomials.coefficients
    size = len(steps)
    if dtype == jnp.float16:
        size = 2
    elif math.prod(a for a, _, _ in steps) > GRAM_GROWTH:
        size = 3
    return [steps[i : i + size] for i in range(0, len(steps), size)]


def _gram_polynomial(x: Array, steps: Sequence[Coefficients]) -> Array:
    """Returns the matrix by which `steps` multiply a `y` with the Gram matrix `x`."""
    dtype, wide = x.dtype, lambda x: x.astype(jnp.float32)
    eye = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=jnp.float32), x.shape)
    # All are polynomials of one symmetric matrix, so they commute.
    multiply = lambda p, q: mirror(commuting_product(p, q)).astype(dtype)

    def factor_of(x: Array, coefficients: Coefficients | Array) -> Array:
        a, b, c = coefficients
        return (a * eye + b * wide(x) + c * wide(multiply(x, x))).astype(dtype)

    def advance(
        carry: tuple[Array, ...], step: Array
    ) -> tuple[tuple[Array, ...], None]:
        x, factor, total = carry
        x = multiply(factor, multiply(x, factor))
        factor = factor_of(x, step)
        return (x, factor, multiply(factor, total)), None

    factor = factor_of(x, steps[0])
    if len(steps) == 1:
        return factor
    rest = jnp.asarray(steps[1:], jnp.float32)
    return jax.lax.scan(advance, (x, factor, factor), rest)[0][2]


def _rescale_rows(y: Array, of_y: Halves) -> tuple[Array, Halves]:
    """Divides rows of `y` by the root of their Gram row's absolute sum."""
    whole = mirror(of_y).astype(jnp.float32)
    sums = jnp.sum(jnp.abs(whole), axis=-1, keepdims=True)
    scale = jnp.where(sums > 0, jax.lax.rsqrt(sums), 0.0)
    return y * scale.astype(y.dtype), halve(scale * whole * scale.mT)


def normalize(
    x: Float[Array, "*batch m n"],
    margin: float = 1.0,
    axis_name: tuple[str, ...] = (),
) -> Float32[Array, "*batch m n"]:
    """Returns `x` in float32 with Frobenius norm `1 / margin`; zero stays zero.

    The largest entry is divided out first, so that no square over- or underflows.
    Columns may be spread over mesh axes, as for `newton_schulz`.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    largest = jax.lax.pmax(largest, axis_name) if axis_name else largest
    x = x / jnp.where(largest > 0, largest, 1.0)
    squares = _sum_over(axis_name, jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    norm = jnp.sqrt(squares)
    return x / jnp.where(norm > 0, margin * norm, 1.0)


def _sum_over(axis_name: tuple[str, ...], x: Any) -> Any:
    """Returns the float32 sum of arrays over devices along mesh axes, if any."""
    if not axis_name:
        return x
    return jax.lax.psum(jax.tree.map(lambda y: y.astype(jnp.float32), x), axis_name)
