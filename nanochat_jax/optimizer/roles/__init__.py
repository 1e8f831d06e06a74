"""The part every parameter plays, and the optimizer it is given to."""

from nanochat_jax.optimizer.roles.given import LABELS as LABELS, Label as Label
from nanochat_jax.optimizer.roles.partition import (
    Roles as Roles,
    partition_by_role as partition_by_role,
)
from nanochat_jax.optimizer.roles.settle import (
    Role as Role,
    label_params as label_params,
    matrices_of as matrices_of,
    settle as settle,
)
