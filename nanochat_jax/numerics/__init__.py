"""Functions of bare arrays, without knowledge of optimizers.

forms         the form and the type in which Newton-Schulz runs
fractions     polar factors by fractions of the Gram matrix, and their operations
hashing       cheap random numbers for rounding and sketches
inverse       inverses of positive definite matrices, in products only
polar         polar factors by Newton-Schulz iteration, and their operations
range_finder  low-rank bases by randomised subspace iteration
symmetric     matrix products, halved where the result is symmetric
"""

from nanochat_jax.numerics import hashing as hashing
from nanochat_jax.numerics.forms import (
    GRAM_RATIO as GRAM_RATIO,
    Form as Form,
    resolve_dtype as resolve_dtype,
    resolve_form as resolve_form,
)
from nanochat_jax.numerics.fractions import (
    zolotarev as zolotarev,
    zolotarev_flops as zolotarev_flops,
)
from nanochat_jax.numerics.polar import (
    newton_schulz as newton_schulz,
    newton_schulz_flops as newton_schulz_flops,
)
from nanochat_jax.numerics.range_finder import (
    POWER_ITERATIONS as POWER_ITERATIONS,
    range_basis as range_basis,
    range_basis_flops as range_basis_flops,
)
from nanochat_jax.numerics.symmetric import Products as Products
from nanochat_jax.polynomials import (
    POLYNOMIALS as POLYNOMIALS,
    QUINTIC as QUINTIC,
    Fractions as Fractions,
    Method as Method,
    Polynomials as Polynomials,
    method_of as method_of,
)
