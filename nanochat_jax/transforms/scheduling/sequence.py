"""Run a transform on one group of leaves after another, to bound its temporaries."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.tree_util import keystr
from jax.typing import ArrayLike

from nanochat_jax.codecs import is_quantized
from nanochat_jax.transforms.scheduling.barrier import in_turn
from nanochat_jax.transforms.scheduling.groups import (
    group_by_shape,
    group_bytes,
    piece_bytes,
)
from nanochat_jax.transforms.scheduling.parts import fill, only, owners_of
from nanochat_jax.transforms.scheduling.rows import update_by_rows
from nanochat_jax.transforms.sharding import (
    NOWHERE,
    Placement,
    in_auto_mode,
    joined,
    varying_axes,
)


def sequence(
    inner: optax.GradientTransformation,
    *,
    max_bytes: int | None = None,
    core_ndim: int | None = None,
    fields: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on groups of leaves of one shape, each after the one before.

    A compiler is free to decode all momenta first and to orthogonalise them together,
    and then holds a float32 copy of everything at once. Here a barrier keeps each
    group from starting before the last has ended, so only one group's copies live at a
    time. Updates and state do not change.

    `inner` must treat each leaf by itself. A transform that does not, such as
    `optax.clip_by_global_norm`, belongs outside.

    Example:
      >>> tx = sequence(optax.chain(momentum(), orthogonalize()))
      >>> params = {"a": jnp.ones((8, 16)), "b": jnp.ones((8, 16))}
      >>> updates, state = tx.update(params, tx.init(params))

    Args:
      inner: Transform to run.
      max_bytes: Most bytes of a group, counted in float32; a larger leaf is a group of
        its own. On several devices it is for each of them. By default 13 MiB on a
        processor and 64 MiB elsewhere.
      core_ndim: Number of last axes that `inner` treats together, if entries of the
        axes before are independent: 1 for elementwise transforms, also quantised, 2 for
        transforms of matrices. A larger leaf of more axes is then worked on a few
        entries of its first axis at a time, by default half a group on a processor;
        not if it is sharded.
      fields: Arrays of about the size of a leaf that its state has: what `max_bytes` is
        by default is divided by it.

    Returns:
      A transformation with the updates and the state of `inner`.

    Raises:
      ValueError: If `max_bytes` or `fields` is less than 1.
    """
    for name, value in {"max_bytes": max_bytes, "fields": fields}.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    inner = optax.with_extra_args_support(inner)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        placement: Placement = NOWHERE,
        layer: ArrayLike = 0,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        flat, treedef = jax.tree.flatten_with_path(updates)
        names, leaves = [keystr(path) for path, _ in flat], [x for _, x in flat]
        most = group_bytes() // fields if max_bytes is None else max_bytes
        rows = piece_bytes() // fields if max_bytes is None else max_bytes
        groups = group_by_shape(leaves, most, devices=placement.devices)
        groups = joined(groups, names, state)
        step = functools.partial(
            inner.update, placement=placement, layer=layer, **extra_args
        )
        alone = placement.devices == 1 and not varying_axes(updates)
        if core_ndim is not None and alone:
            run = functools.partial(_by_rows, step, layer, rows, core_ndim)
        else:
            run = functools.partial(in_turn, step, devices=placement.devices)
        if len(groups) < 2:
            return run((updates, state, params), None)[0]
        weights = None if params is None else treedef.flatten_up_to(params)
        nodes, state_def = jax.tree.flatten(state, is_leaf=is_quantized)
        owners = owners_of(state, updates)
        new_leaves, new_nodes = list(leaves), list(nodes)

        def collect(result: tuple[optax.Updates, optax.OptState]) -> None:
            fill(new_leaves, treedef.flatten_up_to(result[0]))
            fill(new_nodes, state_def.flatten_up_to(result[1]))

        result: Any = None
        for group in groups:
            mine = [i in group for i in range(len(leaves))]
            chosen = {None, *(names[i] for i in group)}
            inputs = (
                treedef.unflatten(only(leaves, mine)),
                state_def.unflatten(only(nodes, [o in chosen for o in owners])),
                weights and treedef.unflatten(only(weights, mine)),
            )
            new_result, result = run(inputs, result)
            if result is not None:
                collect(result)
            result = new_result
        collect(result)
        return treedef.unflatten(new_leaves), state_def.unflatten(new_nodes)

    return optax.GradientTransformationExtraArgs(inner.init, in_auto_mode(update_fn))


def _by_rows(
    step: Callable[..., tuple[Any, Any]],
    layer: ArrayLike,
    max_bytes: int,
    core_ndim: int,
    inputs: Any,
    result: Any,
) -> tuple[Any, Any]:
    """Returns `in_turn(step, inputs, result)`, of a large leaf a few rows at a time."""
    leaves = jax.tree.leaves(inputs[0])
    if len(leaves) != 1 or leaves[0].ndim <= core_ndim:
        return in_turn(step, inputs, result)
    from_row = lambda row: functools.partial(step, layer=layer + row)
    return update_by_rows(from_row, *inputs, max_bytes=max_bytes, result=result)
