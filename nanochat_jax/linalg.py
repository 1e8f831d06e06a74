"""Orthogonalisation of bare matrices by Newton-Schulz iteration.

Everything here acts on the last two axes and treats the axes before them as a batch, so
a stack of layers `[layers, m, n]` needs no `vmap`.

Axis letters: `m` rows, `n` columns.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from nanochat_jax.coefficients import QUINTIC, Coefficients, Polynomials

Form = Literal["auto", "standard", "gram"]

GRAM_GROWTH = 490.0
"""Most growth of rounding errors in float32 before the Gram form restarts."""

NewtonSchulzDtype = Literal["auto", "float32", "bfloat16", "float16"]

_GramOf = Callable[[Array], Array]

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
    times. It squares the condition number, so it needs a long mantissa: in float32 it
    is the standard form to 5e-4, in float16 it begins anew after two steps, and in
    bfloat16 it is refused.

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
    columns = x.shape[-1] * (jax.lax.axis_size(axis_name) if axis_name else 1)
    wide = x.shape[-2] <= columns
    gram_of = lambda y: _sum_over(axis_name, _gram(y, wide))
    y = normalize(x, polynomials.margin, axis_name).astype(dtype)
    gram = gram_of(y)
    if polynomials.rescaling == "aol":
        y, gram = _rescale_rows(y, gram, wide)
    form = resolve_form((x.shape[-2], columns), dtype, form)
    iterate = _iterate if form == "standard" else _iterate_gram
    return iterate(y, gram, polynomials, wide, gram_of).astype(x.dtype)


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
    count, steps = math.prod(shape[:-2]), len(polynomials.coefficients)
    if resolve_form(shape, dtype, form) == "standard":
        return count * steps * (4 * short**2 * long + 2 * short**3)
    starts = len(_segments(polynomials, jnp.dtype(dtype)))
    small = (8 * steps - 6 * starts) * short**3
    return count * (starts * 4 * short**2 * long + small)


def _iterate(
    y: Array, gram: Array, polynomials: Polynomials, wide: bool, gram_of: _GramOf
) -> Array:
    """Applies the polynomials to `y`, whose Gram matrix is `gram`."""
    for i, (a, b, c) in enumerate(polynomials.coefficients):
        gram = gram_of(y) if i else gram
        small = gram.astype(y.dtype)
        square = product("...ij,...jk->...ik", small, small)
        applied = _apply((b * gram + c * square).astype(y.dtype), y, wide)
        y = (a * y.astype(jnp.float32) + applied).astype(y.dtype)
    return y


def _iterate_gram(
    y: Array, gram: Array, polynomials: Polynomials, wide: bool, gram_of: _GramOf
) -> Array:
    """Applies the polynomials to `y` through its Gram matrix."""
    for i, steps in enumerate(_segments(polynomials, y.dtype)):
        gram = gram_of(y) if i else gram
        factor = _gram_polynomial(gram, steps, y.dtype)
        y = _apply(factor, y, wide).astype(y.dtype)
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


def _gram_polynomial(
    gram: Array, steps: Sequence[Coefficients], dtype: DTypeLike
) -> Array:
    """Returns the matrix by which `steps` multiply a `y` with that Gram matrix."""
    multiply = lambda p, q: product("...ij,...jk->...ik", p, q).astype(dtype)
    gram, total = gram.astype(dtype), None
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=dtype), gram.shape)
    for i, (a, b, c) in enumerate(steps):
        step = (a * eye + b * gram + c * multiply(gram, gram)).astype(dtype)
        total = step if total is None else multiply(step, total)
        if i + 1 < len(steps):
            gram = multiply(step, multiply(gram, step))
    assert total is not None
    return total


def _gram(y: Array, wide: bool) -> Array:
    # Naming the contracted axes keeps explicit transposes out of the compiled program.
    return product("...ik,...jk->...ij" if wide else "...ki,...kj->...ij", y, y)


def _apply(p: Array, y: Array, wide: bool) -> Array:
    """Multiplies `y` by the symmetric `p` on its short side."""
    if wide:
        return product("...ij,...jk->...ik", p, y)
    return product("...jk,...ki->...ji", y, p)


def _rescale_rows(y: Array, gram: Array, wide: bool) -> tuple[Array, Array]:
    """Divides rows of `y` by the root of their Gram row's absolute sum."""
    sums = jnp.sum(jnp.abs(gram), axis=-1, keepdims=True)
    scale = jnp.where(sums > 0, jax.lax.rsqrt(sums), 0.0)
    rows = (scale if wide else scale.mT).astype(y.dtype)
    return y * rows, scale * gram * scale.mT


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


def _sum_over(axis_name: tuple[str, ...], x: Array) -> Array:
    """Returns the sum of `x` over devices along mesh axes, if there are any."""
    return jax.lax.psum(x, axis_name) if axis_name else x


def product(axes: str, x: Array, y: Array) -> Array:
    """Returns the product over `axes`, as in `jnp.einsum`, added up in float32."""
    # Highest: on accelerators float32 would otherwise be rounded to shorter mantissas.
    return jnp.einsum(
        axes, x, y, precision="highest", preferred_element_type=jnp.float32
    )
