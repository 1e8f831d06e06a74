"""One program for leaves that are treated alike, in place of one for each group."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath
from jaxtyping import Array

from nanochat_jax.transforms.scheduling.parts import Parts, Result
from nanochat_jax.transforms.scheduling.turns import Row, in_turns
from nanochat_jax.transforms.sharding import Entries, Stack

Kind = Callable[[KeyPath, tuple[int, ...]], Hashable]
"""A function from path and shape of a leaf to what leaves that are treated alike agree
in; `None` for a leaf by itself."""


class Alike(NamedTuple):
    """Leaves that share a program.

    Attributes:
      names: Their names.
      together: Number of them that are stacked at a time; it divides theirs.
    """

    names: tuple[str, ...]
    together: int

    def update(
        self, step: Callable[..., Result], parts: Parts, result: Any = None
    ) -> Result:
        """Returns updates and state of these leaves, with the others absent.

        Args:
          step: `update` of a transform that treats them alike. It is given a stack in
            the place of the first, and the extra argument `entries`.
          parts: Updates, state and parameters.
          result: Arrays to wait for, if any.
        """
        index = [parts.names.index(name) for name in self.names]
        leaves = [parts.leaves[i] for i in index]
        states = [jax.tree.leaves(parts.nodes_of(name)) for name in self.names]
        weights = [[parts.weights[i]] if parts.weights else [] for i in index]
        on_stack = jax.jit(self._on_stack(step, parts))  # traced once for both calls
        like = lambda x: jax.ShapeDtypeStruct((self.together, *x.shape), x.dtype)
        row = jax.tree.map(like, (leaves[0], states[0], weights[0]))
        new, *_ = jax.eval_shape(on_stack, *row, jax.ShapeDtypeStruct((), jnp.int32))
        # Updates of another type cannot be written over gradients.
        in_place = new.dtype == leaves[0].dtype
        buffer = lambda x: x if in_place else jnp.zeros(x.shape, new.dtype)

        def work(written: Row, read: Row, first: Array) -> tuple[Row, list[Any]]:
            leaf, *weight = [written[0], *read] if in_place else read
            update, state, counts = on_stack(leaf, written[1:], weight, first)
            return [update, *state], counts

        done, counts = in_turns(
            work,
            [[buffer(x), *row] for x, row in zip(leaves, states, strict=True)],
            [
                row if in_place else [x, *row]
                for x, row in zip(leaves, weights, strict=True)
            ],
            parts.counts,
            self.together,
            result,
        )
        node_def = jax.tree.structure(parts.nodes_of(self.names[0]))
        updates = dict(zip(self.names, (row[0] for row in done), strict=True))
        nodes = (node_def.unflatten(row[1:]) for row in done)
        return parts.tree(updates, dict(zip(self.names, nodes, strict=True)), counts)

    def _on_stack(
        self, step: Callable[..., Result], parts: Parts
    ) -> Callable[..., tuple[Array, Row, list[Any]]]:
        """Returns the update of a stack: of its arrays, to update, state and counts."""
        head = self.names[0]
        node_def = jax.tree.structure(parts.nodes_of(head))
        stack = Stack(self.names, (), len(self.names))

        def on_stack(
            leaf: Array, state: Row, weight: Row, first: Array
        ) -> tuple[Array, Row, list[Any]]:
            updates, state = parts.tree({head: leaf}, {head: node_def.unflatten(state)})
            params = parts.params(dict(zip([head], weight, strict=False)))
            new = step(updates, state, params, entries={head: Entries(stack, first)})
            update, nodes, counts = parts.taken(head, new)
            return update, jax.tree.leaves(nodes), counts

        return on_stack


def find_alike(parts: Parts, kind: Kind, max_bytes: int) -> list[Alike]:
    """Returns leaves that share a program: those that do not all fit `max_bytes`.

    A leaf is copied where it is worked on. So it is at most half as large as that, and
    as many have their turn together as fit that half.

    Args:
      parts: Updates, state and parameters.
      kind: What leaves agree in that are treated alike.
      max_bytes: Most float32 bytes of a group.
    """
    found: dict[Hashable, list[int]] = {}
    for i, path in enumerate(parts.paths):
        own = kind(path, parts.leaves[i].shape)
        if own is not None:
            found.setdefault((own, _layout(parts, i)), []).append(i)
    shared = []
    for members in found.values():
        fitting = max_bytes // (4 * max(parts.leaves[members[0]].size, 1))
        if not 1 < fitting < len(members):
            continue
        together = _dividing(len(members), fitting // 2)
        whole = len(members) // together * together
        names = tuple(parts.names[i] for i in members[:whole])
        shared.append(Alike(names, together))
    return shared


def _layout(parts: Parts, i: int) -> Hashable:
    """Returns what leaves of one program agree in: types of leaf and state."""
    name = parts.names[i]
    weights = parts.weights[i] if parts.weights else None
    arrays, treedef = jax.tree.flatten((parts.leaves[i], parts.nodes_of(name), weights))
    above = tuple(str(parts.places[j].above) for j in parts.owned.get(name, ()))
    return treedef, above, tuple((x.shape, x.dtype) for x in arrays)


def _dividing(count: int, most: int) -> int:
    """Returns a number up to `most` that divides `count`, if one is over half of it."""
    dividing = max(n for n in range(1, most + 1) if count % n == 0)
    return dividing if 2 * dividing >= most else most
