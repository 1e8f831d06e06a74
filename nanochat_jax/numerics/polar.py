"""Orthogonalisation of bare matrices by Newton-Schulz iteration.

Everything here acts on the last two axes and treats the axes before them as a batch, so
a stack of layers `[layers, m, n]` needs no `vmap`.

Axis letters: `m` rows, `n` columns.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from nanochat_jax.numerics.forms import Form, resolve_form
from nanochat_jax.numerics.symmetric import Halves, Products, mirror, products_here
from nanochat_jax.polynomials import QUINTIC, Coefficients, Polynomials

GRAM_GROWTH = 490.0
"""Most growth of rounding errors before the Gram form restarts."""

_GramOf = Callable[[Array], Halves]


def newton_schulz(
    x: Float[Array, "*batch m n"],
    polynomials: Polynomials = QUINTIC,
    *,
    dtype: DTypeLike = jnp.float32,
    form: Form = "auto",
    axis_name: tuple[str, ...] = (),
    products: Products | None = None,
) -> Float[Array, "*batch m n"]:
    """Returns an approximate polar factor of `x` by Newton-Schulz iteration.

    Each step applies the odd polynomial `aX + b(XXᵀ)X + c(XXᵀ)²X`, which moves every
    singular value towards one and leaves the singular vectors alone. Hence
    `newton_schulz(p @ x) == p @ newton_schulz(x)` for any `p` with orthonormal columns.
    The scale of `x` is divided out in float32 before the cast to `dtype`: gradients of
    1e-30 and of 1e30 give the same result, and a zero matrix gives zero.

    The standard form works on `X` in every step, in `k(4s²l + 2s³)` operations for `k`
    steps, short side `s` and long side `l`. The Gram form (Dao et al. 2026) works on
    `XXᵀ` and multiplies the result into `X`, in `4rs²l + (8k - 6r)s³` if it starts `r`
    times. A step with `c = 0` takes `2s³` less in both. Symmetric products, half of the
    `4s²l` and all of the `s³`, take a quarter less where they are halved. The Gram form
    squares the condition number, so it needs float32, in which the two forms agree to
    5e-4, or to the rounding errors that the steps themselves raise: by the product of
    all `a`, 119 for `cubic` and 8e4 for `deepseek_v4`.

    Example:
      >>> o = newton_schulz(jax.random.normal(jax.random.key(0), (4, 64, 256)))
      >>> o.shape  # singular values of each of the four matrices are near one
      (4, 64, 256)

    Args:
      x: Matrices to orthogonalise.
      polynomials: The polynomials, one for each step, and the scaling they need.
      dtype: Type of the iterate. Products accumulate in float32 whatever it is.
      form: `"standard"`, `"gram"`, or `"auto"` for the one with fewer operations if
        it is safe in `dtype`; see `resolve_form`. For bfloat16, `"auto"` takes the Gram
        form in float32 where that is faster and more exact: on processors without AMX,
        for matrices over five times as long as wide.
      axis_name: Mesh axes over which the columns are sharded, under `jax.shard_map`. No
        matrix may then have more rows than columns in all. Gram matrices are added up
        over these devices, and nothing else of the size of a matrix is sent.
      products: How to multiply; as is best on JAX's default backend if not given.

    Returns:
      An array of the shape and type of `x`, with singular values near one.

    Raises:
      ValueError: If `form` is `"gram"` and `dtype` is shorter than float32.
    """
    products = products_here() if products is None else products
    return _newton_schulz(x, polynomials, jnp.dtype(dtype), form, axis_name, products)


# Traced once for each shape, not once for each of many leaves.
@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _newton_schulz(
    x: Array,
    polynomials: Polynomials,
    dtype: DTypeLike,
    form: Form,
    axis_name: tuple[str, ...],
    products: Products,
) -> Array:
    columns = x.shape[-1] * (jax.lax.axis_size(axis_name) if axis_name else 1)
    form, dtype = _resolve((x.shape[-2], columns), dtype, form, products)
    wide = bool(axis_name) or x.shape[-2] <= x.shape[-1]
    gram_of = lambda y: sum_over(axis_name, products.gram(y))
    y = normalize(x, polynomials.margin, axis_name).astype(dtype)
    y, known = y if wide else y.mT, None
    if polynomials.rescaling == "aol":
        y, known = _rescale_rows(y, gram_of(y), products)
    iterate = _iterate if form == "standard" else _iterate_gram
    y = iterate(y, known, polynomials, gram_of, products)
    return (y if wide else y.mT).astype(x.dtype)


def _resolve(
    shape: tuple[int, ...], dtype: DTypeLike, form: Form, products: Products
) -> tuple[Form, DTypeLike]:
    """Returns form and type of the iteration."""
    short, long = sorted(shape[-2:])
    in_bf16 = jnp.dtype(dtype) == jnp.bfloat16
    if form == "auto" and in_bf16 and long > products.wide_ratio * short:
        return "gram", jnp.dtype(jnp.float32)
    return resolve_form(shape, dtype, form), dtype


def newton_schulz_flops(
    shape: tuple[int, ...],
    polynomials: Polynomials = QUINTIC,
    *,
    dtype: DTypeLike = jnp.float32,
    form: Form = "auto",
    products: Products | None = None,
) -> int:
    """Returns the floating-point operations of the products in `newton_schulz`.

    Args:
      shape: Shape of the matrices, `[*batch, m, n]`.
      polynomials: As for `newton_schulz`.
      dtype: As for `newton_schulz`.
      form: As for `newton_schulz`.
      products: As for `newton_schulz`.
    """
    products = products_here() if products is None else products
    short, long = sorted(shape[-2:])
    steps = polynomials.coefficients
    squares = sum(not _is_cubic(step) for step in steps)
    of_long = products.flops(short, long)
    square = products.flops(short, short)
    applied = 2 * short**2 * long
    if _resolve(shape, dtype, form, products)[0] == "standard":
        total = len(steps) * (of_long + applied) + squares * square
        return math.prod(shape[:-2]) * total
    starts = len(_segments(polynomials))
    small = (3 * (len(steps) - starts) + squares) * square
    return math.prod(shape[:-2]) * (starts * (of_long + applied) + small)


def _iterate(
    y: Array,
    known: Halves | None,
    polynomials: Polynomials,
    gram_of: _GramOf,
    products: Products,
) -> Array:
    """Applies the polynomials to `y`, whose Gram matrix may be known."""
    steps = polynomials.coefficients
    if known is not None:
        y, steps = _step(y, steps[0], known, products, _is_cubic(steps[0])), steps[1:]
    for cubic, run in itertools.groupby(steps, _is_cubic):
        # A loop: one step to compile, and a layout of `y` that does not change within.
        advance = lambda y, step, cubic=cubic: (
            _step(y, step, gram_of(y), products, cubic),
            None,
        )
        y = jax.lax.scan(advance, y, jnp.asarray(list(run), jnp.float32))[0]
    return y


def _step(
    y: Array,
    coefficients: Coefficients | Array,
    of_y: Halves,
    products: Products,
    cubic: bool,
) -> Array:
    a, b, c = coefficients
    # Added in float32, whatever the products are rounded to.
    add = lambda b, x, c, z: b * x.astype(jnp.float32) + c * z.astype(jnp.float32)
    multiply = lambda x: products.multiply("...ij,...jk->...ik", x, y)
    if cubic:
        return add(a, y, b, multiply(mirror(of_y).astype(y.dtype))).astype(y.dtype)
    square = products.gram(mirror(of_y).astype(y.dtype))
    factor = jax.tree.map(lambda g, s: add(b, g, c, s).astype(y.dtype), of_y, square)
    return add(a, y, 1.0, multiply(mirror(factor))).astype(y.dtype)


def _is_cubic(coefficients: Coefficients) -> bool:
    """Returns whether a step lacks the fifth power, and so takes two products."""
    return coefficients[2] == 0


def _iterate_gram(
    y: Array,
    known: Halves | None,
    polynomials: Polynomials,
    gram_of: _GramOf,
    products: Products,
) -> Array:
    """Applies the polynomials to `y` through its Gram matrix, which may be known."""
    for steps in _segments(polynomials):
        known = gram_of(y) if known is None else known
        factor = _gram_polynomial(mirror(known).astype(y.dtype), steps, products)
        applied = products.multiply("...ij,...jk->...ik", factor, y)
        y, known = applied.astype(y.dtype), None
    return y


def _segments(polynomials: Polynomials) -> list[tuple[Coefficients, ...]]:
    """Returns the steps between two restarts of the Gram form.

    Rounding errors of the Gram matrix grow by the product of `a`: by 485 in the
    quintic's five steps, which need no restart.
    """
    steps = polynomials.coefficients
    growth = math.prod(a for a, _, _ in steps)
    size = 3 if growth > GRAM_GROWTH else len(steps)
    return [steps[i : i + size] for i in range(0, len(steps), size)]


def _gram_polynomial(
    x: Array, steps: Sequence[Coefficients], products: Products
) -> Array:
    """Returns the matrix by which `steps` multiply a `y` with the Gram matrix `x`."""
    dtype, wide = x.dtype, lambda x: x.astype(jnp.float32)
    eye = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=jnp.float32), x.shape)
    # All are polynomials of one symmetric matrix, so they commute.
    multiply = lambda p, q: mirror(products.commuting(p, q)).astype(dtype)

    def factor_of(x: Array, coefficients: Coefficients | Array, cubic: bool) -> Array:
        a, b, c = coefficients
        factor = a * eye + b * wide(x)
        if not cubic:
            factor += c * wide(multiply(x, x))
        return factor.astype(dtype)

    def advance(
        carry: tuple[Array, ...], step: Array, cubic: bool
    ) -> tuple[tuple[Array, ...], None]:
        x, factor, total = carry
        x = multiply(factor, multiply(x, factor))
        factor = factor_of(x, step, cubic)
        return (x, factor, multiply(factor, total)), None

    factor = factor_of(x, steps[0], _is_cubic(steps[0]))
    carry = x, factor, factor
    for cubic, run in itertools.groupby(steps[1:], _is_cubic):
        later = jnp.asarray(list(run), jnp.float32)
        step = functools.partial(advance, cubic=cubic)
        carry = jax.lax.scan(step, carry, later)[0]
    return carry[2]


def _rescale_rows(y: Array, of_y: Halves, products: Products) -> tuple[Array, Halves]:
    """Divides rows of `y` by the root of their Gram row's absolute sum."""
    gram = mirror(of_y).astype(jnp.float32)
    sums = jnp.sum(jnp.abs(gram), axis=-1, keepdims=True)
    scale = jnp.where(sums > 0, jax.lax.rsqrt(sums), 0.0)
    return y * scale.astype(y.dtype), products.halve(scale * gram * scale.mT)


def normalize(
    x: Float[Array, "*batch m n"],
    margin: float = 1.0,
    axis_name: tuple[str, ...] = (),
) -> Float32[Array, "*batch m n"]:
    """Returns `x` in float32 with Frobenius norm `1 / margin`; zero stays zero.

    The largest entry is divided out first, so that no square over- or underflows.
    Columns may be sharded over mesh axes, as for `newton_schulz`.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    largest = jax.lax.pmax(largest, axis_name) if axis_name else largest
    x = x / jnp.where(largest > 0, largest, 1.0)
    squares = sum_over(axis_name, jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    norm = jnp.sqrt(squares)
    return x / jnp.where(norm > 0, margin * norm, 1.0)


def sum_over(axis_name: tuple[str, ...], x: Any) -> Any:
    """Returns the float32 sum of arrays over devices along mesh axes, if any."""
    if not axis_name:
        return x
    return jax.lax.psum(jax.tree.map(lambda y: y.astype(jnp.float32), x), axis_name)
