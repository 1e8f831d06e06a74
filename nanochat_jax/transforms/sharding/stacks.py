"""Stacks of matrices of which each device owns some, with their state.

Parameters of one shape are seen as one stack `[size, m, n]`. In the tree that the
wrapped transform is given, the stack stands in the place of its first member, and the
other members are absent. So paths and fields of a state are found as in any other, and
the state itself says which matrices its entries belong to.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.tree_util import keystr
from jax.typing import ArrayLike
from jaxtyping import Array, Int32, PRNGKeyArray, UInt32

from nanochat_jax.numerics import hashing
from nanochat_jax.transforms.sharding import specs
from nanochat_jax.transforms.sharding.placement import Placement
from nanochat_jax.transforms.sharding.whole_matrices import Route

MAX_MATRIX_BYTES = 1 << 30
"""Most float32 bytes of a matrix that has an owner, by default."""


@dataclasses.dataclass(frozen=True)
class Stack:
    """Parameters whose matrices are one stack.

    Attributes:
      members: Their paths, as `jax.tree_util.keystr` has them, in order.
      batch: Shape of the axes before the matrix, of each of them.
      size: Number of entries of the stack, with the zero matrices that fill it up to a
        multiple of the number of devices.
    """

    members: tuple[str, ...]
    batch: tuple[int, ...]
    size: int

    @property
    def each(self) -> int:
        """Number of matrices of each member."""
        return math.prod(self.batch)

    @property
    def matrices(self) -> int:
        """Number of matrices, without those that fill the stack."""
        return len(self.members) * self.each


class Entries(NamedTuple):
    """Entries of a stack that are worked on together.

    Transforms that draw random numbers take them, by path of the first member, as the
    extra argument `entries` of `update`, and hand it on. The extra argument `layer`
    then counts from the first of them on.

    Attributes:
      stack: The stack.
      first: Number of the first entry.
    """

    stack: Stack
    first: ArrayLike

    def members(
        self, layer: ArrayLike, count: int
    ) -> tuple[Int32[Array, "count"], Int32[Array, "count"]]:
        """Returns the member that each entry belongs to, and its place within it.

        Args:
          layer: First of the entries, counted from `first` on.
          count: Number of entries.
        """
        start = jnp.asarray(self.first, jnp.int32) + jnp.asarray(layer, jnp.int32)
        number = start + jnp.arange(count, dtype=jnp.int32)
        member, place = jnp.divmod(number, self.stack.each)
        return jnp.minimum(member, len(self.stack.members) - 1), place

    def words(
        self, word: Callable[[str], int], member: Int32[Array, "count"]
    ) -> UInt32[Array, "count"]:
        """Returns an integer for the member of each entry.

        Args:
          word: Function from the path of a member to an unsigned 32-bit integer.
          member: Members, from `members`.
        """
        table = np.array([word(name) for name in self.stack.members], np.uint32)
        return jnp.asarray(table)[member]

    def keys(
        self,
        seed: int,
        count: Array,
        prefix: str,
        layer: ArrayLike,
        shape: tuple[int, ...],
    ) -> PRNGKeyArray:
        """Returns the random key of each entry, as its member would have it apart.

        Args:
          seed: Seed of the run.
          count: Number of the step.
          prefix: What is written before the path of a leaf, see `hashing.leaf_key`.
          layer: As for `members`.
          shape: Shape of the entries together.
        """
        member, place = self.members(layer, shape[0])
        words = self.words(lambda x: hashing.leaf_word(seed, prefix + x), member)
        start = lambda place: hashing.start_of(place, (1, *shape[1:]))
        key = lambda word, place: hashing.composed_key(count, word, start(place))
        return jax.vmap(key)(words, place)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["inner", "rest"],
    meta_fields=["stacks", "alone"],
)
@dataclasses.dataclass(frozen=True)
class OwnedState:
    """State of a transform that is given parameters stacked.

    Attributes:
      inner: State for the stacks, each in the place of its first member.
      rest: State for parameters that are in none; `None` if all are.
      stacks: The stacks.
      alone: Paths of the parameters that are in none.
    """

    inner: Any
    rest: Any
    stacks: tuple[Stack, ...]
    alone: tuple[str, ...]


def is_owned(node: Any) -> bool:
    """Returns whether a node of a state is an `OwnedState`; for `is_leaf` arguments."""
    return isinstance(node, OwnedState)


def owned_nodes(state: Any) -> list[OwnedState]:
    """Returns the `OwnedState` nodes of a state."""
    return [x for x in jax.tree.leaves(state, is_leaf=is_owned) if is_owned(x)]


class PlacedStack(NamedTuple):
    """A stack on a mesh.

    Attributes:
      stack: The stack.
      route: Way of its matrices to their owners.
    """

    stack: Stack
    route: Route

    @property
    def sharding(self) -> NamedSharding:
        """Sharding of an array with an entry for each matrix of the stack."""
        return specs.with_axes(self.route.sharding, [self.route.names])


def plan(
    tree: Any, placement: Placement, max_matrix_bytes: int = MAX_MATRIX_BYTES
) -> list[PlacedStack]:
    """Returns the stacks of leaves whose matrices have owners.

    These are leaves on several devices whose batch axes are not sharded, and whose
    matrices are not too large for one device. Leaves of one shape, type and sharding
    are one stack.

    Args:
      tree: Parameters, or updates.
      placement: Shardings of the parameters.
      max_matrix_bytes: Most float32 bytes of a matrix that has an owner.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path, x in jax.tree.leaves_with_path(tree):
        sharding = placement.sharding(path, x)
        if sharding is not None and _is_ownable(x, sharding, max_matrix_bytes):
            kind = (x.shape, jnp.dtype(x.dtype), sharding)
            groups.setdefault(kind, []).append(keystr(path))
    places = []
    for (shape, _, sharding), names in groups.items():
        count = len(names) * math.prod(shape[:-2])
        route = Route.of(len(shape), sharding, count)
        stack = Stack(tuple(names), shape[:-2], count + -count % route.devices)
        places.append(PlacedStack(stack, route))
    return places


def _is_ownable(x: Any, sharding: NamedSharding, max_matrix_bytes: int) -> bool:
    if x.ndim < 2 or 0 in x.shape or sharding.mesh.size == 1:
        return False
    *batch, _, _ = specs.axes_of(sharding, x.ndim)
    whole = all(specs.ways(sharding, axes) == 1 for axes in batch)
    return whole and 4 * math.prod(x.shape[-2:]) <= max_matrix_bytes


def joined(
    groups: Sequence[Sequence[int]], names: Sequence[str], state: Any
) -> list[list[int]]:
    """Returns groups of leaves such that the members of a stack are one group.

    Args:
      groups: Indices of leaves.
      names: Paths of all leaves.
      state: State of these leaves.
    """
    home = {
        name: stack.members[0]
        for node in owned_nodes(state)
        for stack in node.stacks
        for name in stack.members
    }
    found: dict[Any, list[int]] = {}
    for number, group in enumerate(groups):
        for i in group:
            found.setdefault(home.get(names[i], number), []).append(i)
    return list(found.values())
