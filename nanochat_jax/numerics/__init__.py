"""TODO."""

from nanochat_jax.numerics import hashing as hashing
from nanochat_jax.numerics.polar import (
    GRAM_RATIO as GRAM_RATIO,
    Form as Form,
    NewtonSchulzDtype as NewtonSchulzDtype,
    newton_schulz as newton_schulz,
    newton_schulz_flops as newton_schulz_flops,
    resolve_dtype as resolve_dtype,
    resolve_form as resolve_form,
)
from nanochat_jax.numerics.polynomials import (
    POLYNOMIALS as POLYNOMIALS,
    QUINTIC as QUINTIC,
    Polynomials as Polynomials,
)
from nanochat_jax.numerics.range_finder import (
    POWER_STEPS as POWER_STEPS,
    range_basis as range_basis,
    range_basis_flops as range_basis_flops,
)
