"""Reads a kernel by the bias beside it, which has the axes of its output."""

from collections.abc import Iterator

from nanochat_jax.optimizer.roles import names
from nanochat_jax.optimizer.roles.leaves import Leaf, Leaves, Shape
from nanochat_jax.optimizer.roles.solve import Way, batches, without
from nanochat_jax.optimizer.roles.stacks import Stack


def is_turned(leaves: Leaves, leaf: Leaf) -> tuple[bool, bool]:
    """Returns whether a leaf of two axes is `(out, in)`, and whether a bias says so."""
    bias = leaves.bias_of(leaf)
    rows, columns = leaf.shape[-2:]
    if bias and rows != columns and bias.shape in ((rows,), (columns,)):
        return bias.shape == (rows,), True
    return names.is_out_in(leaf.name), False


def ways_of_bias(leaves: Leaves, leaf: Leaf, stack: Stack) -> list[Way]:
    """Returns all ways to read a leaf that has a bias beside it."""
    bias = leaves.bias_of(leaf)
    if bias is None:
        return []
    stacks = batches(stack)
    if names.is_out_in(leaf.name):
        # Haliax has `(in, out)` under the same name: both are tried on each stack.
        both = (
            [*_ways(leaf, bias, batch, True)] or _ways(leaf, bias, batch, False)
            for batch in stacks
        )
        return [way for ways in both for way in ways]
    for out_first in (False, True):
        ways = [way for x in stacks for way in _ways(leaf, bias, x, out_first)]
        if ways:
            return ways
    return []


def _ways(
    leaf: Leaf, bias: Leaf, batch: tuple[int, ...], out_first: bool
) -> Iterator[Way]:
    rest, out = without(leaf.shape, batch), without(bias.shape, batch)
    if rest is None or out is None or rest.stacked != out.stacked:
        return
    made, last = _without_ones(out.shape), len(rest.shape)
    if not 0 < len(made) < last or not _may_be(leaf, made, out.shape, last):
        return
    outer = range(len(made)) if out_first else range(last - len(made), last)
    if rest.shape[outer.start : outer.stop] == made:
        inner = [axis for axis in range(last) if axis not in outer]
        what = f"a map from {len(inner)} to {len(outer)} axes, with its bias"
        yield Way(batch, {leaf.path: rest.view(inner, outer)}, what)
    swapped = 1 if out_first else last - 2
    transposed = last > 2 and made == out.shape and not names.is_conv(leaf.module)
    if transposed and (rest.shape[swapped],) == made:
        inner = [axis for axis in range(last) if axis != swapped]
        view = rest.view(inner, [swapped])
        yield Way(batch, {leaf.path: view}, "a transposed convolution, with its bias")


def _may_be(leaf: Leaf, made: Shape, bias: Shape, rank: int) -> bool:
    """Returns whether a layer of this name can have such a kernel and bias.

    Args:
      leaf: The kernel.
      made: Axes of the output.
      bias: Axes of the bias.
      rank: Number of axes of the kernel, without its stack.
    """
    if made != bias:  # a convolution of Equinox: `[out, 1, 1]`
        return len(made) == 1 and len(bias) == rank - 1
    if names.is_dense(leaf.module):
        return rank == 2
    conv = names.is_conv(leaf.module) or names.is_transposed(leaf.module)
    return len(made) == 1 or not conv


def _without_ones(shape: Shape) -> Shape:
    """Returns a bias without the axes of space that Equinox gives convolutions."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
