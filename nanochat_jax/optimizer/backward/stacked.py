"""Trees of stacked arrays, read and written one layer at a time."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.tree_util import keystr
from jax.typing import ArrayLike
from jaxtyping import Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays"],
    meta_fields=["axes", "treedef"],
)
@dataclasses.dataclass(frozen=True)
class Stacked:
    """A tree of arrays, each with an axis that counts layers.

    Attributes:
      arrays: The arrays.
      axes: The axis of each that counts layers.
      treedef: Structure of the tree.
    """

    arrays: list[Array]
    axes: tuple[int, ...]
    treedef: Any

    @classmethod
    def of(cls, tree: Any, axes: Sequence[int] | None = None) -> "Stacked":
        """Returns a tree, by default of arrays `[L, ...]`, as stacked arrays."""
        leaves, treedef = jax.tree.flatten(tree)
        return cls(leaves, (0,) * len(leaves) if axes is None else tuple(axes), treedef)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.arrays[0].shape[self.axes[0]]

    @property
    def tree(self) -> Any:
        """The tree of arrays."""
        return self.treedef.unflatten(self.arrays)

    def part(self, layer: ArrayLike, keep: Sequence[bool] | None = None) -> Any:
        """Returns the entries of one layer, `[1, ...]`.

        Args:
          layer: Index of the layer.
          keep: Which arrays to read, all if not given; others are `None`.
        """
        keep = [True] * len(self.axes) if keep is None else keep
        take = jax.lax.dynamic_slice_in_dim
        known = zip(self.arrays, self.axes, keep, strict=True)
        return self.treedef.unflatten(
            take(x, layer, 1, axis) if wanted else None for x, axis, wanted in known
        )

    def replaced(self, layer: ArrayLike, part: Any) -> "Stacked":
        """Returns the arrays with the entries of one layer replaced.

        Args:
          layer: Index of the layer.
          part: Its entries, `[1, ...]`, or `None` for an array that stays.
        """
        put = jax.lax.dynamic_update_slice_in_dim
        known = zip(
            self.arrays, self.treedef.flatten_up_to(part), self.axes, strict=True
        )
        arrays = [
            x if new is None else put(x, new, layer, axis) for x, new, axis in known
        ]
        return dataclasses.replace(self, arrays=arrays)

    def read(self, layer: ArrayLike) -> tuple[Any, "Stacked"]:
        """Returns one layer of arrays `[L, ...]`, and the arrays to carry on in a loop.

        Compilers for processors before JAX 0.11 widen all layers of bfloat16 arrays
        before a loop that does not change them. Behind a barrier they cannot tell.
        """
        stacked = jax.lax.optimization_barrier(self)
        return jax.tree.map(lambda x: x[0], stacked.part(layer)), stacked


def number_of_layers(blocks: Any, name: str) -> int:
    """Returns the number of layers of stacked blocks.

    Args:
      blocks: A tree of arrays `[L, ...]`.
      name: Name of the blocks, for the message.

    Raises:
      ValueError: If there are none, or their first axes differ; with all of them.
    """
    shapes = {keystr(p): x.shape for p, x in jax.tree.leaves_with_path(blocks)}
    sizes = {shape[:1] for shape in shapes.values()}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"{name!r} must hold stacked blocks: every leaf `[L, ...]`, with the same "
            "L, got\n" + "\n".join(f"  {key} of shape {x}" for key, x in shapes.items())
        )
    return sizes.pop()[0]
