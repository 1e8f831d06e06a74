"""Run a transform on whole matrices, each on the device that owns it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr
from jaxtyping import Array

from nanochat_jax.numerics import resolve_dtype
from nanochat_jax.transforms import precision, record
from nanochat_jax.transforms.owners import trees
from nanochat_jax.transforms.owners.exchange import on_owners
from nanochat_jax.transforms.scheduling import sequence
from nanochat_jax.transforms.sharding import (
    MAX_MATRIX_BYTES,
    NOWHERE,
    OwnedState,
    PlacedStack,
    Placement,
    Route,
    Stack,
    in_auto_mode,
    laid_out,
    layout,
    plan,
)


def owned(
    inner: optax.GradientTransformation,
    *,
    dtype: str = "auto",
    max_matrix_bytes: int = MAX_MATRIX_BYTES,
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on whole matrices, each on the device that owns it.

    Under `distribute`, parameters of one shape are seen as one stack of matrices, zero
    matrices fill it up to a multiple of the number of devices, and every device owns
    as many. One all-to-all brings it its matrices, one sends the results back, and
    nothing is sent in between: the state of a matrix is kept by its owner. So updates
    are those of one device, also where `inner` adds up rows or columns of a matrix, as
    `galore` does. On one device it does nothing.

    `inner` must treat each matrix, the last two axes of a leaf, by itself. It sees
    no parameters: zeros at `init`, none at `update`. It belongs inside the view and
    inside whatever needs parameters, such as weight decay.

    Example:
      >>> tx = owned(optax.chain(galore(momentum(), 8), orthogonalize()))
      >>> params = {"a": jnp.ones((32, 64)), "b": jnp.ones((32, 64))}
      >>> updates, state = tx.update(params, tx.init(params))

    Args:
      inner: Transform of matrices.
      dtype: Type in which matrices are sent, there and back; gradients and updates
        that have other types are rounded to it. "auto" and "bfloat16" are as for
        `orthogonalize`; with "float32" they are sent as they are.
      max_matrix_bytes: Most float32 bytes of a matrix that has an owner. Larger
        ones, and those of leaves whose batch axes are sharded, are left to `inner` as
        they are.

    Returns:
      A transformation with the state of `inner`, on several devices in an
      `OwnedState`.

    Raises:
      ValueError: At `update`, if members of a stack are missing.
    """
    inner = optax.with_extra_args_support(inner)
    # A stack holds all matrices of a device, of which a few are worked on at a time.
    local = sequence(precision.in_float32(inner), core_ndim=2)

    def init_fn(params: optax.Params) -> Any:
        now = layout()
        placed = plan(params, now.placement, max_matrix_bytes)
        if now.per_leaf or not placed:
            return inner.init(params)
        return _init_stacks(inner, params, placed)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        placement: Placement = NOWHERE,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params
        if not isinstance(state, OwnedState):
            return inner.update(updates, state, placement=placement, **extra_args)
        extra_args.pop("layer", None)  # layers of a stack are its entries
        planned = plan(updates, placement, max_matrix_bytes)
        short = resolve_dtype(dtype) == "bfloat16"
        new, after = _update_stacks(
            local, updates, state, _placed(state, updates, planned, placement),
            extra_args, "bfloat16" if short else None,
        )  # fmt: skip
        rest = state.rest
        if rest is not None:
            others = trees.replaced(updates, trees.members_of(state.stacks), {})
            done, rest = inner.update(others, rest, placement=placement, **extra_args)
            new |= trees.by_path(done)
        updates = jax.tree.map_with_path(lambda path, _: new[keystr(path)], updates)
        return updates, OwnedState(after, rest, state.stacks, state.alone)

    return optax.GradientTransformationExtraArgs(init_fn, in_auto_mode(update_fn))


def per_leaf(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the state of each leaf by itself, wherever `owned` would stack it.

    So a state has one entry for each layer of a leaf, as `update_in_backward` needs.

    Example:
      >>> tx = per_leaf(owned(galore(momentum(), 8)))
      >>> state = tx.init({"kernel": jnp.ones((32, 64))})

    Args:
      tx: A transformation.

    Returns:
      The transformation, with another `init`.
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: optax.Params) -> optax.OptState:
        with laid_out(per_leaf=True):
            return tx.init(params)

    return tx._replace(init=init_fn)


def _init_stacks(
    inner: optax.GradientTransformationExtraArgs,
    params: optax.Params,
    placed: Sequence[PlacedStack],
) -> OwnedState:
    record.tell(stacks={x.stack.members[0]: x.sharding for x in placed})
    stacks, leaves = tuple(x.stack for x in placed), trees.by_path(params)
    members = trees.members_of(stacks)
    alone = tuple(name for name in leaves if name not in members)
    zeros = {x.members[0]: _zeros(x, leaves[x.members[0]]) for x in stacks}
    with laid_out(stacks={x.members[0]: x for x in stacks}):
        state = inner.init(trees.replaced(params, {*members, *alone}, zeros))
    rest = inner.init(trees.replaced(params, members, {})) if alone else None
    return OwnedState(state, rest, stacks, alone)


def _update_stacks(
    local: optax.GradientTransformationExtraArgs,
    updates: optax.Updates,
    state: OwnedState,
    placed: Sequence[PlacedStack],
    extra_args: dict[str, Any],
    dtype: str | None,
) -> tuple[dict[str, Array], optax.OptState]:
    """Returns the updates of the members of stacks by path, and their state.

    Args:
      local: Transform that a device runs on the matrices it owns.
      updates: Gradients.
      state: State of the stacks.
      placed: Stacks whose members have gradients.
      extra_args: Extra arguments.
      dtype: Type in which matrices are sent, if not their own.
    """
    leaves = trees.by_path(updates)
    places = {*trees.members_of(state.stacks), *state.alone}
    nothing = {x.members[0]: None for x in state.stacks}
    like = trees.replaced(
        updates, places, nothing | {x.stack.members[0]: 0 for x in placed}
    )

    def step(
        own: dict[str, Array], state: optax.OptState, entries: Any, **extra: Any
    ) -> tuple[dict[str, Array], optax.OptState]:
        tree = trees.replaced(updates, places, nothing | own)
        new, state = local.update(tree, state, None, entries=entries, **extra)
        return trees.by_path(new), state

    if not placed:  # counts go on
        return step({}, state.inner, {}, **extra_args)
    members = [[leaves[name] for name in x.stack.members] for x in placed]
    done, after = on_owners(step, placed, members, state.inner, like, extra_args, dtype)
    names = [name for x in placed for name in x.stack.members]
    found = [x for parts in done for x in parts]
    return dict(zip(names, found, strict=True)), after


def _zeros(stack: Stack, member: Array) -> Array:
    return jnp.zeros((stack.size, *member.shape[-2:]), member.dtype)


def _placed(
    state: OwnedState,
    updates: optax.Updates,
    planned: Sequence[PlacedStack],
    placement: Placement,
) -> list[PlacedStack]:
    """Returns the stacks of some updates with the way of matrices to their owners.

    Raises:
      ValueError: If parameters are not sharded as the state is laid out for.
    """
    stacks = trees.stacks_given(state, trees.by_path(updates))
    if placement.devices == 1:
        return [PlacedStack(stack, Route(None)) for stack in stacks]
    routes = {x.stack.members: x.route for x in planned}
    fits = lambda x: x.members in routes and x.size % routes[x.members].devices == 0
    wrong = [f"  {', '.join(x.members)}" for x in stacks if not fits(x)]
    if wrong:
        raise ValueError(
            "the state is laid out for parameters that are sharded otherwise. It has "
            "stacks of\n" + "\n".join(wrong) + "\nLay it out anew: "
            "`restacked(state, jax.eval_shape(tx.init, params))`."
        )
    return [PlacedStack(stack, routes[stack.members]) for stack in stacks]
