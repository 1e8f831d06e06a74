"""Arrays of a state that belong to one layer of a stack, or to some of the leaves.

The state of an optimizer for stacked blocks, `[L, ...]`, is one state for all of them.
Its part for one layer has a slice `[1, ...]` of each array of theirs, nothing of other
parameters, and counts as they are: it is a state of the same transformation.
"""

from typing import Any, NamedTuple

import jax
import optax
from jax.tree_util import DictKey, keystr

from nanochat_jax.codecs import is_quantized
from nanochat_jax.optimizer.backward.stacked import number_of_layers
from nanochat_jax.transforms import locate

Axes = tuple[int | None, ...]


class Layout(NamedTuple):
    """Owner of every node of a state, and the axis of its arrays that counts layers.

    Attributes:
      treedef: Structure of the state; an array in few bits is one node.
      owners: Path of the parameter that a node belongs to; `None` for counts.
      axes: The axis that counts layers, for each array of a node of the stack; `None`
        for other nodes.
    """

    treedef: Any
    owners: list[str | None]
    axes: list[Axes | None]

    @property
    def stack_axes(self) -> list[int]:
        """The axes that count layers, of all arrays of the stack in order."""
        found = [axis for axes in self.axes for axis in axes or ()]
        return [axis for axis in found if axis is not None]

    @property
    def stack_owners(self) -> list[str]:
        """The parameters of all arrays of the stack in order."""
        pairs = zip(self.owners, self.axes, strict=True)
        return [str(owner) for owner, axes in pairs for _ in axes or ()]

    def of_stack(self, nodes: list[Any]) -> list[Any]:
        """Returns the nodes of the stack, others `None`."""
        pairs = zip(nodes, self.axes, strict=True)
        return [None if axes is None else x for x, axes in pairs]


def layout_of(
    tx: optax.GradientTransformation, params: dict[str, Any], stack: str
) -> Layout:
    """Returns the layout of the state of an optimizer.

    Args:
      tx: The optimizer.
      params: Shapes of the parameters, a dict of stacked blocks and the rest.
      stack: Key of the blocks.

    Raises:
      ValueError: If an array of the state that belongs to a block has no entry for each
        layer; with all of them.
    """
    state = jax.eval_shape(tx.init, params)
    flat, treedef = jax.tree.flatten_with_path(state, is_leaf=is_quantized)
    places = locate(state, params)
    owners = [places[keystr(path)].name for path, _ in flat]
    resized = _with_other_layers(tx, params, stack, jax.tree.structure(state))
    prefix = keystr((DictKey(stack),))
    axes: list[Axes | None] = []
    wrong = []
    for (path, node), owner, other in zip(flat, owners, resized, strict=True):
        of_stack = owner is not None and owner.startswith(prefix)
        found = _differing_axes(node, other)
        axes.append(found if of_stack else None)
        if of_stack == (None in found):
            shapes = " and ".join(str(x.shape) for x in jax.tree.leaves(node))
            wrong.append(f"  {keystr(path)} of shape {shapes}")
    if wrong:
        raise ValueError(
            "an update in the backward pass needs a state with one entry for each "
            f"layer in every array that belongs to {stack!r}, and in no other. "
            "Otherwise are\n" + "\n".join(wrong)
        )
    return Layout(treedef, owners, axes)


def _with_other_layers(
    tx: optax.GradientTransformation, params: dict[str, Any], stack: str, like: Any
) -> list[Any]:
    """Returns the nodes of a state for another number of layers."""
    layers = number_of_layers(params[stack], stack)
    # A leaf may be in few bits from some size on: a number at which none changes.
    for number in (layers + 1, max(layers - 1, 1), 4 * layers):
        resize = lambda x, n=number: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)
        other = {**params, stack: jax.tree.map(resize, params[stack])}
        state = jax.eval_shape(tx.init, other)
        if number != layers and jax.tree.structure(state) == like:
            return jax.tree.leaves(state, is_leaf=is_quantized)
    raise ValueError(
        "an update in the backward pass needs a state whose structure does not depend "
        f"on the number of layers of {stack!r}, {layers}."
        + "".join(f"\n  {name} does" for name in _dependent(tx, params, other))
    )


def _dependent(tx: optax.GradientTransformation, *params: Any) -> list[str]:
    """Returns the paths of the stored leaves whose form differs from tree to tree.

    One that is stored along its layers has no entry for each, as that of a `[L]`.
    """
    found = [
        jax.tree.leaves_with_path(jax.eval_shape(tx.init, tree), is_leaf=is_quantized)
        for tree in params
    ]
    forms = [{keystr(p): jax.tree.structure(x) for p, x in nodes} for nodes in found]
    return [name for name, form in forms[0].items() if forms[1].get(name) != form]


def _differing_axes(node: Any, other: Any) -> Axes:
    """Returns the axis in which each array of two nodes differs; `None` for none."""
    pairs = zip(jax.tree.leaves(node), jax.tree.leaves(other), strict=True)
    differing = (
        [m != n for m, n in zip(x.shape, y.shape, strict=True)] for x, y in pairs
    )
    return tuple(axes.index(True) if True in axes else None for axes in differing)
