"""An update of stacks, each device working on the matrices it owns."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jax.tree_util import keystr
from jax.typing import DTypeLike
from jaxtyping import Array

from nanochat_jax.codecs import is_quantized
from nanochat_jax.transforms.sharding import Entries, PlacedStack, placement
from nanochat_jax.transforms.state_paths import locate

Step = Callable[..., tuple[dict[str, Array], Any]]
"""An update: stacks by path, state, entries by path, extra arguments."""


def on_owners(
    step: Step,
    placed: Sequence[PlacedStack],
    leaves: Sequence[Sequence[Array]],
    state: Any,
    like: Any,
    extra_args: Mapping[str, Any],
    dtype: DTypeLike | None,
) -> tuple[list[list[Array]], Any]:
    """Returns updates of the members of some stacks, and the state.

    Args:
      step: Update that a device makes of its entries of all stacks.
      placed: The stacks.
      leaves: Members of each.
      state: State of the update.
      like: Tree of the parameters that the state has copies of.
      extra_args: Extra arguments, of which arrays are the same on all devices.
      dtype: Type in which matrices are sent; their own if not given.
    """
    arrays = {k: v for k, v in extra_args.items() if isinstance(v, jax.Array)}
    static = {k: v for k, v in extra_args.items() if k not in arrays}

    def body(leaves: Any, state: Any, arrays: Any) -> tuple[list[list[Array]], Any]:
        own, entries = {}, {}
        for (stack, route), parts in zip(placed, leaves, strict=True):
            sent = dtype or parts[0].dtype
            first = stack.members[0]
            own[first] = route.there(parts, stack.size, sent).astype(sent)
            start = lax.axis_index(route.names) * len(own[first]) if route.names else 0
            entries[first] = Entries(stack, start)
        new, state = step(own, state, entries, **arrays, **static)
        back = [
            route.back(new[stack.members[0]], parts)
            for (stack, route), parts in zip(placed, leaves, strict=True)
        ]
        return back, state

    meshes = [x.route.sharding for x in placed if x.route.sharding is not None]
    if not meshes:
        return body(leaves, state, arrays)
    of_leaves = [
        [x.route.sharding.spec] * len(parts)
        for x, parts in zip(placed, leaves, strict=True)
    ]
    of_state = _specs(placed, state, like)
    run = jax.shard_map(
        body,
        mesh=placement.mesh_of(meshes[0]),
        in_specs=(of_leaves, of_state, PartitionSpec()),
        out_specs=(of_leaves, of_state),
        check_vma=False,
    )
    return run(leaves, state, arrays)


def _specs(placed: Sequence[PlacedStack], state: Any, like: Any) -> Any:
    """Returns how the arrays of a state are sharded, by the axis of entries."""
    names = {x.stack.members[0]: x.route.names for x in placed}
    places = locate(state, like)
    flat, treedef = jax.tree.flatten_with_path(state, is_leaf=is_quantized)
    found = [places[keystr(path)].name for path, _ in flat]
    entries = [
        PartitionSpec(names[x]) if x in names else PartitionSpec() for x in found
    ]
    return treedef.unflatten(entries)
