"""Groups of parameters with settings of their own.

paths     paths of parameters, of modules around them, and of layers in a stack
match     the group of each parameter
member    what a group changes in the part that a parameter plays
by_group  one transform for each group, and one state for all of them
"""

from nanochat_jax.optimizer.groups.by_group import by_group as by_group
from nanochat_jax.optimizer.groups.match import groups_of as groups_of
from nanochat_jax.optimizer.groups.member import (
    in_group as in_group,
    require_use as require_use,
)
from nanochat_jax.optimizer.groups.paths import (
    layer_paths as layer_paths,
    nearest_paths as nearest_paths,
    slashed_paths as slashed_paths,
    with_parents as with_parents,
)
