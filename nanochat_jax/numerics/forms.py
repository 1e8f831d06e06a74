"""The form and the type in which Newton-Schulz runs."""

import functools
import math
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Form = Literal["auto", "standard", "gram"]

GRAM_RATIO = 1.5
"""Long side over short side above which the Gram form takes fewer operations."""

WIDE_RATIO = 5.0
"""Long side over short side above which Gram in float32 is faster than bfloat16.

Measured on AVX-512 BF16, whose products are twice as fast as in float32: it takes 0.7
times as long at 192 x 2064, 0.9 at 384 x 2064, and 1.05 at 192 x 768.
"""

_NATIVE_BF16 = ("amx_bf16", "avx512_bf16", "bf16")


def resolve_form(
    shape: tuple[int, ...], dtype: DTypeLike, form: Form = "auto"
) -> Literal["standard", "gram"]:
    """Returns the form that `newton_schulz` takes for a shape and a type.

    `"auto"` is the Gram form in float32 where the long side is over 1.5 times the short
    one, from where on it takes fewer operations, and else the standard form.

    Args:
      shape: Shape of the matrices, `[*batch, m, n]`.
      dtype: Type of the iterate.
      form: Form that is asked for.

    Raises:
      ValueError: If `form` is `"gram"` and `dtype` is shorter than float32.
    """
    precise = jnp.dtype(dtype) in (jnp.float32, jnp.float64)
    if form == "gram" and not precise:
        raise ValueError(
            f"the Gram form needs float32, got {jnp.dtype(dtype).name}, in which its "
            "error is larger than its result. Use the standard form."
        )
    if form != "auto":
        return form
    short, long = sorted(shape[-2:])
    return "gram" if precise and long > GRAM_RATIO * short else "standard"


def resolve_dtype(dtype: str = "auto") -> str:
    """Returns the type in which Newton-Schulz runs on this machine.

    `"auto"` is bfloat16 on accelerators and on processors that multiply it natively
    (AMX or AVX-512 BF16 on x86, BF16 on Arm, as Linux lists them), and float32 on
    others, which emulate it more slowly than they multiply float32.

    Args:
      dtype: Type that is asked for.
    """
    if dtype != "auto":
        return dtype
    if jax.default_backend() != "cpu":
        return "bfloat16"
    return "float32" if _processor_words().isdisjoint(_NATIVE_BF16) else "bfloat16"


def wide_ratio() -> float:
    """Returns the ratio of sides above which "auto" iterates in float32 for bfloat16.

    Infinite on accelerators and on processors with AMX, whose bfloat16 is many times as
    fast as float32.
    """
    on_cpu = jax.default_backend() == "cpu"
    return WIDE_RATIO if on_cpu and "amx_bf16" not in _processor_words() else math.inf


@functools.cache
def _processor_words() -> frozenset[str]:
    """Returns the words with which Linux describes the processor, none elsewhere."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return frozenset()
