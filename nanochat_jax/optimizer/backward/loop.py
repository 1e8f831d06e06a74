"""The backward pass through a stack, which updates a layer at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from nanochat_jax.optimizer.backward import passes
from nanochat_jax.optimizer.backward.stacked import Stacked
from nanochat_jax.optimizer.backward.updates import PartUpdates, Tally
from nanochat_jax.transforms import (
    AppliesUpdates,
    after,
    from_bits,
    group_by_shape,
    group_bytes,
    to_bits,
)


class Loop(NamedTuple):
    """The backward pass, which updates a layer at a time.

    Attributes:
      block: As in `passes.Model`.
      updates: The updates of the step.
      stack: Key of the stacked blocks.
      segment: Layers of a segment.
    """

    block: Callable[[Any, Any], Any]
    updates: PartUpdates
    stack: str
    segment: int

    def run(
        self, kept: Any, dx: Any, params: Any, nodes: list[Any], tally: Tally
    ) -> tuple[Any, Any, list[Any], Tally]:
        """Returns gradients of the first hidden states, parameters, state and tally.

        Args:
          kept: Hidden states before each segment.
          dx: Gradients of the last hidden states.
          params: Parameters.
          nodes: Nodes of the state.
          tally: Tally of the parts before.
        """
        layout, blocks = self.updates.layout, Stacked.of(params[self.stack])
        state = Stacked.of(layout.of_stack(nodes), layout.stack_axes)
        segments = blocks.layers // self.segment

        def go_back(i: Array, carry: Any) -> Any:
            turn = segments - 1 - i
            start = turn * self.segment
            dx, blocks, *others = carry
            x = jax.tree.map(lambda x, dx: from_bits(x[turn], dx.dtype), kept, dx)
            if self.segment == 1:
                return self.layer(start, x, *carry)
            (blocks, _), xs = passes.inputs_of(
                self.block, blocks, x, start, self.segment
            )
            bits = jax.tree.map(to_bits, xs)

            def go_back_one(i: Array, carry: Any) -> Any:
                j = self.segment - 1 - i
                x = jax.tree.map(lambda b, x: from_bits(b[j], x.dtype), bits, xs)
                return self.layer(start + j, x, *carry)

            carry = (dx, blocks, *others)
            return jax.lax.fori_loop(0, self.segment, go_back_one, carry)

        # The head is updated first, so that its gradient is not kept.
        begin = after(jnp.int32(0), (tally, params, nodes))
        dx, blocks, state, tally = jax.lax.fori_loop(
            begin, segments, go_back, (dx, blocks, state, tally)
        )
        nodes = [x if y is None else y for x, y in zip(nodes, state.tree, strict=True)]
        return dx, {**params, self.stack: blocks.tree}, nodes, tally

    def layer(
        self,
        layer: Array,
        x: Any,
        dx: Any,
        blocks: Stacked,
        state: Stacked,
        tally: Tally,
    ) -> tuple[Any, Stacked, Stacked, Tally]:
        """Returns the carry of the loop after the update of a layer."""
        # Read apart from what is written back, or compilers copy all layers.
        read = lambda *part: jax.lax.optimization_barrier(part[0].part(*part[1:]))
        one = jax.tree.map(lambda x: x[0], read(blocks, layer))
        grads, dx = passes.layer_gradients(self.block, one, x, dx)
        take, norm, tally = self.updates.judge(tally, grads)
        leaves, treedef = jax.tree.flatten(jax.tree.map(lambda g: g[None], grads))
        names = self.updates.names(self.stack)
        owners = self.updates.layout.stack_owners
        tree = lambda blocks: self.updates.tree({self.stack: blocks})
        done: Any = (leaves, dx)
        # A group of leaves at a time, read once more when its turn has come.
        groups = [list(range(len(leaves)))]
        if isinstance(self.updates.tx, AppliesUpdates):
            groups = group_by_shape(leaves, group_bytes())
        for group in groups:
            mine = [i in group for i in range(len(leaves))]
            chosen = {names[i] for i in group}
            late = after(layer, done)
            entries = read(state, late, [owner in chosen for owner in owners])
            params, nodes, tally = self.updates.apply(
                tally,
                take,
                tree(
                    treedef.unflatten(
                        g if i in group else None for i, g in enumerate(leaves)
                    )
                ),
                [x if jax.tree.leaves(x) else None for x in entries],
                tree(read(blocks, late, mine)),
                layer=layer,
                norm=norm,
            )
            done = (params, nodes)
            blocks = blocks.replaced(layer, params[self.stack])
            new = [x if y is None else y for x, y in zip(entries, nodes, strict=True)]
            state = state.replaced(layer, new)
        return dx, blocks, state, tally
