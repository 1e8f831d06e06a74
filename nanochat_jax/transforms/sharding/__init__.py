"""Transforms on a mesh of devices.

placement       shardings of the parameters of an update, and constraints from them
auto_mode       updates of arrays on Explicit mesh axes
specs           mesh axes of arrays that stem from a parameter
whole_matrices  work on whole matrices that are sharded
stacks          matrices that devices own, and their state
layouts         the layout of states that are made
bits            arrays as integers, which compilers do not convert
varying         mesh axes over which arrays vary under `jax.shard_map`
"""

from nanochat_jax.transforms.sharding import (
    placement as placement,
    specs as specs,
    whole_matrices as whole_matrices,
)
from nanochat_jax.transforms.sharding.auto_mode import (
    in_auto_mode as in_auto_mode,
    seen_as as seen_as,
    sharded_as as sharded_as,
)
from nanochat_jax.transforms.sharding.bits import (
    from_bits as from_bits,
    to_bits as to_bits,
)
from nanochat_jax.transforms.sharding.layouts import (
    laid_out as laid_out,
    layout as layout,
)
from nanochat_jax.transforms.sharding.placement import (
    NOWHERE as NOWHERE,
    Placement as Placement,
)
from nanochat_jax.transforms.sharding.stacks import (
    MAX_MATRIX_BYTES as MAX_MATRIX_BYTES,
    Entries as Entries,
    OwnedState as OwnedState,
    PlacedStack as PlacedStack,
    Stack as Stack,
    is_owned as is_owned,
    joined as joined,
    owned_nodes as owned_nodes,
    plan as plan,
)
from nanochat_jax.transforms.sharding.varying import (
    vary_over as vary_over,
    varying_axes as varying_axes,
)
from nanochat_jax.transforms.sharding.whole_matrices import Route as Route
