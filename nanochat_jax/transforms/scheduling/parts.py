"""Parts of updates and state: those of some leaves, with the others absent."""

from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.tree_util import keystr

from nanochat_jax.codecs import is_quantized
from nanochat_jax.transforms.state_paths import locate


def owners_of(state: optax.OptState, updates: optax.Updates) -> list[str | None]:
    """Returns which leaf each node of a state belongs to; `None` for counts.

    Args:
      state: State of a transform, whose quantised arrays are a node each.
      updates: Updates, or parameters.
    """
    places = locate(state, updates)
    nodes = jax.tree.leaves_with_path(state, is_leaf=is_quantized)
    return [places[keystr(path)].name for path, _ in nodes]


def only(items: Sequence[Any], keep: Sequence[bool]) -> list[Any]:
    """Returns items with `None`, an absent leaf, for those that are not kept.

    Args:
      items: Leaves or nodes.
      keep: Whether each is kept.
    """
    return [x if kept else None for x, kept in zip(items, keep, strict=True)]


def fill(items: list[Any], new: Sequence[Any]) -> None:
    """Writes new items over old ones, but for those that are absent.

    Args:
      items: Leaves or nodes.
      new: As many, `None` for absent ones.
    """
    items[:] = [old if x is None else x for old, x in zip(items, new, strict=True)]
