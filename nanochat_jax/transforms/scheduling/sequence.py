"""Run a transform on one group of leaves after another, to bound its temporaries."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.typing import ArrayLike

from nanochat_jax.transforms.scheduling.alike import Alike, Kind, find_alike
from nanochat_jax.transforms.scheduling.barrier import in_turn
from nanochat_jax.transforms.scheduling.groups import (
    group_by_shape,
    group_bytes,
    piece_bytes,
)
from nanochat_jax.transforms.scheduling.parts import Parts
from nanochat_jax.transforms.scheduling.rows import update_by_rows
from nanochat_jax.transforms.sharding import (
    NOWHERE,
    Placement,
    in_auto_mode,
    joined,
    owned_nodes,
    varying_axes,
)


def sequence(
    inner: optax.GradientTransformation,
    *,
    max_bytes: int | None = None,
    core_ndim: int | None = None,
    fields: int = 1,
    alike: Kind | None = None,
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
      alike: Function from path and shape of a leaf to what leaves must agree in for
        `inner` to treat them alike, whatever their paths; `None` for a leaf by itself.
        On a processor, leaves of one shape that agree, and of which there are several
        groups, have one program: a few at a time are stacked, `[n, *shape]`, and
        `inner` is given the stack in the place of the first, with the extra argument
        `entries`, by path, to tell whose entries they are. By default none are.

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
        most = group_bytes() // fields if max_bytes is None else max_bytes
        rows = piece_bytes() // fields if max_bytes is None else max_bytes
        step = functools.partial(
            inner.update, placement=placement, layer=layer, **extra_args
        )
        parts = Parts.of(updates, state, params)
        alone = placement.devices == 1 and not varying_axes(updates)
        shared = []
        if alike and alone and _may_share(state, layer, extra_args):
            shared = find_alike(parts, alike, most)
        if core_ndim is not None and alone:
            run = functools.partial(_by_rows, step, layer, rows, core_ndim)
        else:
            run = functools.partial(in_turn, step, devices=placement.devices)
        groups = _groups(parts, shared, most, placement.devices)
        if len(groups) < 2 and not shared:
            return run((updates, state, params), None)[0]
        done = parts
        result: Any = None
        for each in shared:
            result = each.update(step, parts, result)
            done = done.replaced(result)
        for group in groups:
            new, result = run(parts.some(group), result)
            done = done if result is None else done.replaced(result)
            result = new
        return done.replaced(result).whole()

    return optax.GradientTransformationExtraArgs(inner.init, in_auto_mode(update_fn))


def _may_share(state: Any, layer: ArrayLike, extra_args: Mapping[str, Any]) -> bool:
    """Returns whether leaves may be stacked: only where code is most of the cost.

    Accelerators wait for the host at every turn of a loop that depends on data.
    """
    stacked = owned_nodes(state) or extra_args.get("entries")
    whole = isinstance(layer, int) and layer == 0
    return jax.default_backend() == "cpu" and whole and not stacked


def _groups(
    parts: Parts, shared: Sequence[Alike], max_bytes: int, devices: int
) -> list[list[str]]:
    """Returns the names of the leaves that are worked on together."""
    taken = {name for each in shared for name in each.names}
    names = [name for name in parts.names if name not in taken]
    leaves = [
        x
        for x, name in zip(parts.leaves, parts.names, strict=True)
        if name not in taken
    ]
    groups = group_by_shape(leaves, max_bytes, devices=devices)
    groups = joined(groups, names, parts.whole()[1])
    return [[names[i] for i in group] for group in groups]


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
