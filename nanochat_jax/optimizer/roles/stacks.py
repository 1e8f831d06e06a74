"""Whether a block is stacked, and on which axis, as the norms and biases in it tell."""

from typing import NamedTuple

from nanochat_jax.optimizer.roles import names
from nanochat_jax.optimizer.roles.leaves import Leaf, Leaves
from nanochat_jax.optimizer.roles.names import Words


class Stack(NamedTuple):
    """Evidence on the stack that a leaf is in.

    Attributes:
      known: Whether there is evidence.
      places: Axes on which it may be stacked; none if it is not.
      whole: Whether a part of the block is hardly stacked once more by itself.
    """

    known: bool
    places: tuple[int, ...] = ()
    whole: bool = True


UNKNOWN = Stack(False, whole=False)
SINGLE = Stack(True)


def stack_of(leaves: Leaves, leaf: Leaf) -> Stack:
    """Returns the evidence of the nearest norms and biases on the stack around a leaf.

    A gain with two axes is one of a stack, and so is all else in the module around its
    norm; in a block among others, a vector with one axis tells that the block is not
    stacked.
    """
    for depth in range(len(leaf.module), -1, -1):
        around = leaf.words[:depth]
        found = leaves.remember(_evidence, around)
        whole = _is_part(leaf.module[depth:])
        if found == SINGLE and not (whole and any(map(names.is_block, around[-1:]))):
            return UNKNOWN
        if found is not None:
            return found._replace(whole=found.known and whole)
    return UNKNOWN


def _evidence(leaves: Leaves, around: Words) -> Stack | None:
    """Returns the evidence of the vectors in a module, `None` if there are none."""
    vectors = [x for x in leaves.below[around] if _is_near(leaves, x, len(around))]
    gains = [x for x in vectors if leaves.is_gain(x) and not _is_single(x)]
    places = _places(leaves, around, gains)
    if places:
        return Stack(True, places)
    if any(map(_is_single, vectors)):
        return UNKNOWN if gains else SINGLE
    return None


def _is_single(vector: Leaf) -> bool:
    """Returns whether a vector is in no stack: `[C]`, `[1, 1, 1, C]`, `[C, 1, 1]`."""
    return vector.rank < 2 or (vector.rank > 2 and vector.thick < 2)


def _is_near(leaves: Leaves, vector: Leaf, depth: int) -> bool:
    """Returns whether a vector is of a module, a layer right in it, or a norm in it."""
    between = vector.module[depth:]
    near = len(between) < 2 or all(map(names.is_norm, between))
    return near and leaves.is_vector(vector)


def _is_part(between: Words) -> bool:
    """Returns whether the words from a block to a leaf's module name no other stack."""
    if any(map(names.is_stack, between)):
        return False
    return len(between) < 2 or (len(between) == 2 and names.is_inner(between[0]))


def _places(leaves: Leaves, around: Words, gains: list[Leaf]) -> tuple[int, ...]:
    """Returns the axes on which all leaves of a module can be stacked alike."""
    if not gains:
        return ()
    shape = min(gains, key=lambda x: x.rank).shape
    inside = leaves.below[around]
    thin = {x.shape for x in inside if x.rank < 2}
    places = tuple(
        axis
        for axis in (0, 1, -1)
        if all(
            _can_be_stacked(leaves, x, axis, shape[axis]) for x in inside if x.rank > 1
        )
    )
    # A leaf with one axis is a stack of numbers, or else in no stack.
    if thin and (len(places) > 1 or thin != {(shape[axis],) for axis in places}):
        return ()
    return places


def _can_be_stacked(leaves: Leaves, leaf: Leaf, axis: int, size: int) -> bool:
    own = 2 if names.is_matrix(leaf.name) and not leaves.is_vector(leaf) else 0
    enough = leaf.rank > max(own, axis)
    return enough and leaf.shape[axis] == size
