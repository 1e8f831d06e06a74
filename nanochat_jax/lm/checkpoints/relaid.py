"""States that are stored in the layout of another number of devices.

The layout of a state, its stacks of matrices, is stored beside it. Checkpoints of
earlier versions, and of one device, have the state of each leaf by itself.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from nanochat_jax.lm.checkpoints.assemble import put_as
from nanochat_jax.transforms import owners

_KEY = "stacks"


def record_of(state: Any) -> dict[str, Any]:
    """Returns what is to be stored beside a state, as JSON values."""
    layout = owners.layout_of(state)
    return {_KEY: owners.as_json(layout)} if layout else {}


def as_stored(target: Any, record: Mapping[str, Any]) -> Any:
    """Returns the tree to be read for a target, in the layout that is stored.

    Arrays of another layout are read to the host, so that no device holds one whole.

    Args:
      target: Tree of arrays, or of shapes.
      record: Record beside the stored state.
    """
    layout = owners.from_json(record.get(_KEY, {}))
    if layout == owners.layout_of(target):
        return target
    shapes = jax.tree.map(_as_shape, target)
    kept = {id(x) for x in jax.tree.leaves(shapes)}
    return jax.tree.map(
        lambda x: x if id(x) in kept else np.empty(x.shape, x.dtype),
        owners.with_layout(shapes, layout),
    )


def from_stored(target: Any, stored: Any) -> Any:
    """Undoes `as_stored`.

    Args:
      target: Tree of arrays, or of shapes.
      stored: What was read.

    Returns:
      The arrays in the layout and the places of the target.
    """
    if owners.layout_of(stored) == owners.layout_of(target):
        return stored
    moved = owners.restacked(stored, target)
    place = lambda x, like: put_as(like, x) if isinstance(x, np.ndarray) else x
    return jax.tree.map(place, moved, target)


def _as_shape(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return x
    sharding = getattr(x, "sharding", None)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
