"""Readings of a tree without modules, from names, shapes and siblings.

    read_tree({path: shape, ...}) -> {path: Reading, ...}

Paths are JAX's own key paths, or names. All leaves are read at once, since the leaves
beside a leaf are evidence. An ambiguous leaf is refused: its label is `None`, and the
reason lists the readings that are left.
"""

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

from nanochat_jax.optimizer.roles import names
from nanochat_jax.optimizer.roles.biases import is_turned, ways_of_bias
from nanochat_jax.optimizer.roles.groups import ways_of_families, ways_of_lora
from nanochat_jax.optimizer.roles.heads import find_heads
from nanochat_jax.optimizer.roles.leaves import Leaf, Leaves, Shape
from nanochat_jax.optimizer.roles.solve import Way, settled
from nanochat_jax.optimizer.roles.stacks import Stack, stack_of
from nanochat_jax.transforms import MatrixAxes

LAST_TWO = MatrixAxes(-2, -1)
LAST_TWO_TURNED = MatrixAxes(-1, -2)


class Reading(NamedTuple):
    """Reading of a parameter by names and shapes.

    Attributes:
      label: `"matrix"`, `"embedding"`, `"head"` or `"vector"`; `None` if refused.
      axes: Axes of the matrices, if it is a matrix.
      reason: The evidence, or the readings that are left.
      assumed: Whether two axes were taken as `(fan_in, fan_out)`, as nothing says
        otherwise.
    """

    label: str | None
    axes: MatrixAxes | None
    reason: str
    assumed: bool = False


def read_tree(shapes: Mapping[Hashable, Shape]) -> dict[Any, Reading]:
    """Reads all parameters of a tree.

    Example:
      >>> found = read_tree({"key.kernel": (64, 4, 16), "out.kernel": (4, 16, 64)})
      >>> str(found["key.kernel"].axes)
      'MatrixAxes(fan_in=(-3,), fan_out=(-2, -1))'

    Args:
      shapes: Shapes by path: JAX's key paths, or names with dots or slashes.

    Returns:
      A reading of each, by the same paths.
    """
    leaves = Leaves(shapes)
    heads = find_heads(leaves)
    thick = any(leaf.unnamed and leaf.rank > 2 for leaf in leaves.all)
    return {leaf.path: _read(leaves, leaf, heads, thick) for leaf in leaves.all}


def _read(leaves: Leaves, leaf: Leaf, heads: set[Any], thick: bool) -> Reading:
    """Reads a leaf.

    Args:
      leaves: All leaves.
      leaf: The one to read.
      heads: Paths of output layers.
      thick: Whether the tree has leaves without names of more than two axes.
    """
    label = _label(leaves, leaf, heads)
    if label:
        return label
    if leaf.unnamed and thick:
        return _refused("no names: a vector of each head and a matrix look alike")
    if leaf.unnamed and leaf.rank == 2:
        return Reading("matrix", LAST_TWO, "two axes", assumed=True)
    stack = stack_of(leaves, leaf)
    if _is_stacked_vector(leaf, stack):
        return Reading("vector", None, "one axis in a stack of blocks")
    return _matrix(leaves, leaf, stack)


def _label(leaves: Leaves, leaf: Leaf, heads: set[Any]) -> Reading | None:
    """Returns the reading of a leaf that its name settles, or its number of axes."""
    if leaf.rank < 2:
        return Reading("vector", None, "fewer than two axes")
    if leaves.is_vector(leaf):
        return Reading("vector", None, "name")
    if leaf.path in heads:
        return Reading("head", None, "name")
    if _is_table(leaves, leaf):
        return Reading("embedding", None, "name")
    if leaf.thick < 2 and not _says_matrix(leaves, leaf):
        return Reading("vector", None, "one axis longer than 1")
    return None


def _is_table(leaves: Leaves, leaf: Leaf) -> bool:
    named = bool(leaf.words) and names.is_table(leaf.words)
    return named and not (names.is_matrix(leaf.name) and leaves.bias_of(leaf))


def _says_matrix(leaves: Leaves, leaf: Leaf) -> bool:
    return names.is_matrix(leaf.name) or bool(leaves.lora_pair(leaf))


def _is_stacked_vector(leaf: Leaf, stack: Stack) -> bool:
    return bool(stack.places) and leaf.rank == 2 and not names.is_matrix(leaf.name)


def _matrix(leaves: Leaves, leaf: Leaf, stack: Stack) -> Reading:
    """Returns the axes of a matrix, or why they are not known."""
    if leaf.rank == 2:
        return _two_axes(leaves, leaf)
    tries = (ways_of_lora, ways_of_families, ways_of_bias)
    for ways in tries:
        left = settled(ways(leaves, leaf, stack), leaf, stack)
        if len(left) == 1:
            assumed = not (left[0].sure or names.is_matrix(leaf.name))
            axes = left[0].views[leaf.path]
            return Reading("matrix", axes, left[0].what, assumed)
        if left:
            return _refused(f"{len(left)} readings are left: {_listed(left)}")
    return _alone(leaf, stack)


def _two_axes(leaves: Leaves, leaf: Leaf) -> Reading:
    """Returns the reading of a leaf with two axes."""
    turned, by_bias = is_turned(leaves, leaf)
    axes = LAST_TWO_TURNED if turned else LAST_TWO
    if by_bias:
        return Reading("matrix", axes, "two axes, the bias beside it")
    if turned:
        return Reading("matrix", axes, "two axes, (out, in) by the name")
    sure = names.is_matrix(leaf.name) or bool(leaves.lora_pair(leaf))
    return Reading("matrix", axes, "two axes", assumed=not sure)


def _alone(leaf: Leaf, stack: Stack) -> Reading:
    """Returns the reading of a leaf without evidence beside it."""
    turned = names.is_out_in(leaf.name)
    kept = [*range(-leaf.rank, 0)]
    if len(stack.places) == 1:
        kept.pop(stack.places[0])
        if len(kept) == 2:
            rows, columns = kept
            axes = MatrixAxes(columns, rows) if turned else MatrixAxes(rows, columns)
            assumed = not names.is_matrix(leaf.name)
            return Reading("matrix", axes, "two axes in a stack of blocks", assumed)
    if _is_whole_conv(leaf, len(kept), stack):
        fan_out = kept.pop(0 if turned else -1)
        return Reading("matrix", MatrixAxes(tuple(kept), fan_out), "convolution")
    plain = not turned and not names.is_transposed(leaf.module)
    if plain and all(size == 1 for size in leaf.shape[:-2]):
        return Reading("matrix", LAST_TWO, "two axes longer than 1")
    return _refused("more than two axes, and nothing tells which are summed over")


def _is_whole_conv(leaf: Leaf, rank: int, stack: Stack) -> bool:
    """Returns whether all axes outside a stack belong to one convolution."""
    if not names.is_conv(leaf.module) or not names.is_matrix(leaf.name):
        return False
    if rank == 3 and names.is_conv_for_sure(leaf.module):
        return True
    return stack.known and stack.whole and len(stack.places) < 2


def _refused(reason: str) -> Reading:
    return Reading(None, None, reason)


def _listed(ways: list[Way]) -> str:
    stacked = lambda way: f", stacked on axis {way.batch[0]}" if way.batch else ""
    return "; or ".join(way.what + stacked(way) for way in ways)
