"""TODO."""

from nanochat_jax.lm.planning import (
    mesh_plan as mesh_plan,
    optimizer_summary as optimizer_summary,
    run_memory as run_memory,
)
from nanochat_jax.lm.planning.variants import (
    BASELINE as BASELINE,
    Variant as Variant,
    parse_variants as parse_variants,
)
