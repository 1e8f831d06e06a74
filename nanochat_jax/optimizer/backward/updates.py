"""Updates of one part of the parameters after another, within one step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr
from jaxtyping import Array, Bool, Float32, Int32

from nanochat_jax.optimizer.backward.layout import Layout
from nanochat_jax.optimizer.backward.passes import merged
from nanochat_jax.transforms import AppliesUpdates, apply_if, sum_of_squares


class Tally(NamedTuple):
    """What the parts of a step add up to.

    Attributes:
      counts: Nodes of the state that belong to no parameter, after the last part that
        was updated.
      squares: Sum of the squares of all gradients.
      left_out: Parts that were not updated.
    """

    counts: list[Any]
    squares: Float32[Array, ""]
    left_out: Int32[Array, ""]


class PartUpdates(NamedTuple):
    """An optimizer in one step, for a part of the parameters at a time.

    Attributes:
      tx: The optimizer.
      shapes: Shapes of all parameters.
      layout: Layout of the state.
      nodes: Nodes of the state before the step.
      take: Whether the step is taken.
      loss: Its loss, for transformations that take a `value`.
      absent: Node in place of an absent leaf, see `with_marker`.
    """

    tx: optax.GradientTransformation
    shapes: Any
    layout: Layout
    nodes: list[Any]
    take: Bool[Array, ""]
    loss: Array
    absent: Any = None

    def with_marker(self, grads: Any) -> "PartUpdates":
        """Returns the updates with a mark for absent leaves that the optimizer takes.

        That is `None` for those of this package, and for most. Masks and labels that
        are functions of a tree leave `optax.MaskedNode` alone, and `None` they do not.

        Args:
          grads: Gradients of some leaves, others `None`.
        """
        if isinstance(self.tx, AppliesUpdates):
            return self
        for absent in (None, optax.MaskedNode()):
            updates = self._replace(absent=absent)
            try:
                jax.eval_shape(
                    lambda grads, params, updates=updates: updates.of_leaves(
                        updates.tally, grads, updates.nodes, params
                    ),
                    grads,
                    self.shapes,
                )
            except (TypeError, ValueError):
                continue
            return updates
        return self

    def names(self, stack: str) -> list[str]:
        """Returns the paths of the parameters of a stack, in order."""
        part = {stack: self.shapes[stack]}
        return [keystr(path) for path, _ in jax.tree.leaves_with_path(part)]

    @property
    def nothing(self) -> dict[str, Any]:
        """A tree like the parameters with all leaves absent."""
        return jax.tree.map(lambda _: None, self.shapes)

    def tree(self, part: dict[str, Any]) -> dict[str, Any]:
        """Returns a tree like the parameters with some of its entries given."""
        return {**self.nothing, **part}

    @property
    def tally(self) -> Tally:
        """The tally before the first part."""
        counts = self.counts_of(self.nodes)
        return Tally(counts, jnp.zeros([]), jnp.zeros([], jnp.int32))

    def of_leaves(
        self, tally: Tally, grads: Any, nodes: Sequence[Any], params: Any, **extra: Any
    ) -> tuple[Any, list[Any], Tally]:
        """Updates some leaves.

        Args:
          tally: Tally of the parts before.
          grads: A tree like the parameters with gradients of these leaves, others
            absent.
          nodes: Nodes of a state.
          params: A tree like the parameters.
          **extra: Extra arguments of the update.

        Returns:
          Parameters and nodes with those of these leaves updated, and the tally.
        """
        part = jax.tree.map(
            lambda g, p: None if g is None else p,
            grads, params, is_leaf=lambda x: x is None,
        )  # fmt: skip
        chosen = {keystr(path) for path, _ in jax.tree.leaves_with_path(grads)}
        pairs = zip(nodes, self.layout.owners, strict=True)
        mine = [x if owner in chosen else None for x, owner in pairs]
        take, norm, tally = self.judge(tally, grads)
        new, mine, tally = self.apply(
            tally, take, grads, mine, part, norm=norm, **extra
        )
        done = [old if x is None else x for old, x in zip(nodes, mine, strict=True)]
        return merged(params, new), done, tally

    def judge(self, tally: Tally, grads: Any) -> tuple[Array, Array, Tally]:
        """Decides whether a part is updated: if its gradients are finite.

        Args:
          tally: Tally of the parts before.
          grads: Gradients of the part.

        Returns:
          Whether it is, the norm of its gradients, and the tally with this part.
        """
        squares = sum_of_squares(grads).astype(jnp.float32)
        take = self.take & jnp.isfinite(squares)
        tally = tally._replace(
            squares=tally.squares + squares, left_out=tally.left_out + ~take
        )
        return take, jnp.sqrt(squares), tally

    def apply(
        self,
        tally: Tally,
        take: Array,
        grads: Any,
        nodes: Sequence[Any],
        params: Any,
        **extra: Any,
    ) -> tuple[Any, list[Any], Tally]:
        """Updates some leaves of a part, or leaves them as they are.

        Args:
          tally: Tally of the updates before.
          take: Whether the part is updated.
          grads: A tree like the parameters, with all other leaves absent.
          nodes: Nodes of the state of these leaves, others `None`.
          params: A tree like `grads`.
          **extra: Extra arguments of the update.

        Returns:
          Parameters and nodes of these leaves, others absent, and the tally.
        """
        # Counts are those before the step, for every part.
        given = zip(self.nodes, nodes, self.layout.owners, strict=True)
        mark = lambda x: self.absent if x is None else x
        state = self.layout.treedef.unflatten(
            old if owner is None else mark(node) for old, node, owner in given
        )
        grads, params = (
            jax.tree.map(mark, tree, is_leaf=lambda x: x is None)
            for tree in (grads, params)
        )
        params, state = apply_if(
            take, self.tx, grads, state, params,
            value=self.loss, whole=self.shapes, **extra,
        )  # fmt: skip
        unmark = lambda x: None if isinstance(x, optax.MaskedNode) else x
        is_mark = lambda x: isinstance(x, optax.MaskedNode)
        params = jax.tree.map(unmark, params, is_leaf=is_mark)
        new = self.layout.treedef.flatten_up_to(state)
        counts = jax.tree.map(
            lambda old, new: jnp.where(take, new, old),
            tally.counts,
            self.counts_of(new),
        )
        owned = zip(new, self.layout.owners, strict=True)
        nodes = [None if owner is None else unmark(x) for x, owner in owned]
        return params, nodes, tally._replace(counts=counts)

    def counts_of(self, nodes: Sequence[Any]) -> list[Any]:
        """Returns the nodes that belong to no parameter."""
        pairs = zip(nodes, self.layout.owners, strict=True)
        return [x for x, owner in pairs if owner is None]

    def state(self, nodes: Sequence[Any], tally: Tally) -> optax.OptState:
        """Returns the state after the last part.

        Args:
          nodes: Nodes that belong to parameters.
          tally: Tally of all parts.
        """
        counts = iter(tally.counts)
        pairs = zip(nodes, self.layout.owners, strict=True)
        return self.layout.treedef.unflatten(
            next(counts) if owner is None else x for x, owner in pairs
        )
