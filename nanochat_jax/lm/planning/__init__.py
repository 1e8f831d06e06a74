"""Plans: memory, operations and traffic of a run, before it is run.

run_memory         bytes of a run, from the plans of its compiled programs
step_parts         parts of the memory of a step, from shapes
memory_limit       settings with which a step fits a limit, the cheapest first
limit_summary      text and a table about these
mesh_plan          bytes and traffic of a run on a mesh, from shapes alone
step_traffic       collectives of loss and gradient, from shapes
update_traffic     collectives of an update of the matrices, from shapes
hlo_collectives    collectives of a compiled program, from its text
breakdown          groups, storage and operations of an optimizer, as numbers
optimizer_summary  text and tables about an optimizer
variants           variants of the optimizer, by name
"""

from nanochat_jax.lm.planning import (
    breakdown as breakdown,
    limit_summary as limit_summary,
    memory_limit as memory_limit,
    mesh_plan as mesh_plan,
    optimizer_summary as optimizer_summary,
    run_memory as run_memory,
)
from nanochat_jax.lm.planning.step_parts import (
    part_lines as part_lines,
    parts_from_shapes as parts_from_shapes,
)
from nanochat_jax.lm.planning.variants import (
    BASELINE as BASELINE,
    Variant as Variant,
    parse_variants as parse_variants,
)
