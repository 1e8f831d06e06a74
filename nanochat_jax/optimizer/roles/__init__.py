"""Roles of parameters: matrix, embedding, head, vector or frozen.

settle     the role of each parameter: given, declared by modules, or read
freeze     parameters that patterns freeze
given      labels and axes that the user or the modules give
layouts    `read_tree`: readings of a tree without modules, or refusals
leaves     leaves with their neighbours
names      rules for names
stacks     evidence for stacked layers
heads      evidence for output layers
biases     evidence for axes from biases
groups     evidence for axes from modules that belong together
published  layouts of published models
solve      all ways to read leaves that belong together
partition  one optimizer for each role
"""

from nanochat_jax.optimizer.roles.freeze import (
    frozen_by as frozen_by,
    stop_gradients as stop_gradients,
)
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
