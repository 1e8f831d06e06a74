"""Whole matrices, with their state, each on the device that owns it.

owned     `owned`, a wrapper
trees     trees in which stacks stand in the place of their first members
exchange  matrices brought to their owners, and updates brought back
restack   states laid out for another number of devices
"""

from nanochat_jax.transforms.owners.owned import (
    owned as owned,
    per_leaf as per_leaf,
)
from nanochat_jax.transforms.owners.restack import (
    as_json as as_json,
    from_json as from_json,
    layout_of as layout_of,
    restacked as restacked,
    with_layout as with_layout,
)
