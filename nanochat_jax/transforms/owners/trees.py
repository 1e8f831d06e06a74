"""Trees in which stacks stand in the place of their first members."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.tree_util import KeyPath, keystr

from nanochat_jax.transforms.sharding import OwnedState, Stack


def by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path."""
    return {keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}


def replaced(tree: Any, names: Collection[str], values: Mapping[str, Any]) -> Any:
    """Returns a tree with other nodes in some places.

    Args:
      tree: A tree, in which leaves may be absent.
      names: Paths of these places.
      values: Nodes by path; a place that is not among them is made absent.
    """

    def visit(path: KeyPath, x: Any) -> Any:
        name = keystr(path)
        return values.get(name, optax.MaskedNode()) if name in names else x

    return jax.tree.map_with_path(visit, tree, is_leaf=is_absent)


def is_absent(node: Any) -> bool:
    """Returns whether a node of a tree stands in place of an absent leaf."""
    return node is None or isinstance(node, optax.MaskedNode)


def members_of(stacks: Sequence[Stack]) -> set[str]:
    """Returns the paths of the parameters of some stacks."""
    return {name for stack in stacks for name in stack.members}


def stacks_given(state: OwnedState, leaves: Mapping[str, Any]) -> list[Stack]:
    """Returns the stacks whose members are among some leaves.

    Args:
      state: The state.
      leaves: Leaves by path.

    Raises:
      ValueError: If some members of a stack are missing.
    """
    given = [x for x in state.stacks if any(name in leaves for name in x.members)]
    missing = sorted(members_of(given) - leaves.keys())
    if missing:
        raise ValueError(
            "matrices of one shape have one stack in the state of `owned`, so they are "
            "updated together, but these are missing:\n  " + "\n  ".join(missing) + "\n"
            "Give an update for each, or keep the state of each leaf by itself: "
            "`per_leaf(tx)`."
        )
    return given
