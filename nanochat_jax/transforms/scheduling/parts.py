"""Updates and state taken apart by leaves, updated in parts, and put together again."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.tree_util import KeyPath, keystr
from jaxtyping import Array

from nanochat_jax.codecs import is_quantized
from nanochat_jax.transforms.state_paths import Place, locate

Result = tuple[Any, Any]
"""Updates and state."""


class Parts(NamedTuple):
    """Updates, state and params of an `update`, by leaves.

    Attributes:
      paths: Paths of the leaves.
      names: The same, as `keystr` has them.
      leaves: Their updates.
      places: Leaf that each node of the state belongs to, and field; a node of none is
        a count, which every part has, and which is the same after each.
      nodes: Nodes of the state, of which a stored array is one.
      owned: Numbers of the nodes of each leaf by name, and of counts.
      weights: Parameters, `None` if there are none.
      treedef: Structure of the updates.
      state_def: Structure of the state.
    """

    paths: list[KeyPath]
    names: list[str]
    leaves: list[Array]
    places: list[Place]
    nodes: list[Any]
    owned: Mapping[str | None, Sequence[int]]
    weights: list[Array] | None
    treedef: Any
    state_def: Any

    @classmethod
    def of(
        cls, updates: optax.Updates, state: optax.OptState, params: optax.Params | None
    ) -> "Parts":
        """Takes updates, state and parameters apart."""
        flat, treedef = jax.tree.flatten_with_path(updates)
        nodes, state_def = jax.tree.flatten_with_path(state, is_leaf=is_quantized)
        located = locate(state, updates)
        places = [located[keystr(path)] for path, _ in nodes]
        owned: dict[str | None, list[int]] = {}
        for i, place in enumerate(places):
            owned.setdefault(place.name, []).append(i)
        return cls(
            [path for path, _ in flat],
            [keystr(path) for path, _ in flat],
            [x for _, x in flat],
            places,
            [node for _, node in nodes],
            owned,
            None if params is None else treedef.flatten_up_to(params),
            treedef,
            state_def,
        )

    @property
    def counts(self) -> list[Any]:
        """Nodes of the state that belong to no leaf."""
        return self._nodes_of(None, self.nodes)

    def nodes_of(self, name: str) -> list[Any]:
        """Returns the nodes of the state that belong to a leaf."""
        return self._nodes_of(name, self.nodes)

    def some(self, chosen: Collection[str]) -> tuple[Any, Any, Any]:
        """Returns updates, state and params of some leaves, with the others absent."""
        nodes = {name: self.nodes_of(name) for name in chosen}
        mine = dict(zip(self.names, self.leaves, strict=True))
        updates, state = self.tree({name: mine[name] for name in chosen}, nodes)
        weights = dict(zip(self.names, self.weights or (), strict=False))
        return updates, state, self.params({name: weights.get(name) for name in chosen})

    def tree(
        self,
        leaves: Mapping[str, Any],
        nodes: Mapping[str, Sequence[Any]],
        counts: Sequence[Any] | None = None,
    ) -> Result:
        """Returns updates and state of the leaves that are given, others absent.

        Args:
          leaves: Updates by name.
          nodes: Nodes of the state by name of the leaf that they belong to.
          counts: Nodes that belong to none; those that are there, if not given.
        """
        given: dict[str | None, Any] = {name: iter(x) for name, x in nodes.items()}
        given[None] = iter(self.counts if counts is None else counts)
        state = [next(given.get(place.name, iter(())), None) for place in self.places]
        updates = self.treedef.unflatten(leaves.get(name) for name in self.names)
        return updates, self.state_def.unflatten(state)

    def params(self, weights: Mapping[str, Any]) -> Any:
        """Returns a tree of the parameters that are given, if there are any at all."""
        if self.weights is None:
            return None
        return self.treedef.unflatten(weights.get(name) for name in self.names)

    def taken(self, name: str, result: Result) -> tuple[Any, list[Any], list[Any]]:
        """Returns update and nodes of one leaf, and counts, of a result."""
        leaves = self.treedef.flatten_up_to(result[0])
        nodes = self.state_def.flatten_up_to(result[1])
        leaf = leaves[self.names.index(name)]
        return leaf, self._nodes_of(name, nodes), self._nodes_of(None, nodes)

    def replaced(self, result: Result) -> "Parts":
        """Returns the parts with the updates and nodes of a result that are there."""
        new = self.treedef.flatten_up_to(result[0])
        nodes = self.state_def.flatten_up_to(result[1])
        return self._replace(
            leaves=_filled(self.leaves, new), nodes=_filled(self.nodes, nodes)
        )

    def whole(self) -> Result:
        """Returns updates and state of all leaves."""
        leaves, nodes = self.leaves, self.nodes
        return self.treedef.unflatten(leaves), self.state_def.unflatten(nodes)

    def _nodes_of(self, name: str | None, nodes: Sequence[Any]) -> list[Any]:
        return [nodes[i] for i in self.owned.get(name, ())]


def _filled(items: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    """Returns new items, and old ones where these are absent."""
    return [old if x is None else x for old, x in zip(items, new, strict=True)]
