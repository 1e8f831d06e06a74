"""Give each parameter to the optimizer of its role, matrices as matrices."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, keystr

from nanochat_jax.interop import as_arrays
from nanochat_jax.optimizer.roles.settle import Role
from nanochat_jax.transforms import (
    AppliesUpdates,
    record,
    require_state,
    seen_by,
    sequence,
)

Roles = Mapping[str, Role]


def partition_by_role(
    optimizers: Callable[[Roles], Mapping[str, optax.GradientTransformation]],
    settle: Callable[[optax.Params], Roles],
    around: Callable[
        [optax.GradientTransformation], optax.GradientTransformation
    ] = lambda tx: tx,
    part_of: Callable[[Role], str] = lambda role: role.label,
    note_of: Callable[[Role], Any] = lambda role: None,
    fields: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Gives each parameter to the optimizer of its role.

    Parameters with the label `"matrix"` are in the part `"matrix"`, and in no other.
    Matrices are seen as such, by `as_matrices`, one group of equal shapes after
    another. Frozen parameters, and leaves that are no arrays, have no state and no
    update: zeros where there is a gradient. `flax.nnx` variables are taken as the
    arrays they hold.

    Args:
      optimizers: Function from roles to optimizers by part.
      settle: Function from parameters to the role of each, by path.
      around: Wrapper of the partition, such as clipping by the norm of all
        gradients but those of frozen parameters.
      part_of: Function from a role to its part; by label if not given.
      note_of: Function from a role to a note on its optimizer, for `describe`.
      fields: Arrays of about the size of a matrix that its state has.

    Returns:
      A transformation, from gradients to updates. Its `update` takes the extra
      arguments `apply`, and `whole`: shapes of all parameters, where the tree that is
      given is a part of theirs, so that roles are those of the whole.

    Raises:
      ValueError: At `update`, if a parameter that is not frozen has no gradient.
    """

    def parts(tree: Any, roles: Roles) -> optax.GradientTransformationExtraArgs:
        trained = {k: part_of(x) for k, x in roles.items() if not _is_frozen(x)}
        known: dict[Any, Any] = dict(optimizers(roles))
        # Labels of leaves that `sequence` has left out too, for the state has these.
        labels = jax.tree.map_with_path(
            lambda path, _: trained.get(keystr(path)), tree, is_leaf=lambda x: x is None
        )
        known["matrix"] = _as_matrices(known["matrix"], roles, fields)
        # A tree that is an Equinox module can be called, and `partition` would do so.
        by_label = _checked(optax.partition(known, lambda _: labels))
        return optax.with_extra_args_support(around(by_label))

    def init_fn(params: optax.Params) -> optax.OptState:
        params = as_arrays(params)
        roles = settle(params)
        if record.is_recording():
            by_path = {path: note_of(role) for path, role in roles.items()}
            record.tell(roles=roles, optimizers=by_path)
        trained = _without_frozen(params, roles)
        return parts(trained, roles).init(trained)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        whole: optax.Params | None = None,
        *,
        apply: bool = False,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        grads, params = as_arrays(updates), as_arrays(params)
        known = grads if params is None else params
        roles = settle(known if whole is None else as_arrays(whole))
        trained, frozen = _without_frozen(grads, roles), grads
        if params is not None:
            frozen = params if apply else grads
            params = _without_frozen(params, roles)
            _require_gradients(trained, params)
        new, state = parts(trained, roles).update(
            trained, state, params, apply=apply, **extra_args
        )
        fill = (lambda p: p) if apply else _unchanged
        return _with_frozen(updates, frozen, new, fill), state

    return AppliesUpdates(init_fn, update_fn)


def _checked(
    by_label: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Returns a partition that refuses a state restored as plain dicts by name."""

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        require_state(state, optax.PartitionState, "muon")
        return by_label.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(by_label.init, update_fn)


def _as_matrices(
    inner: optax.GradientTransformation, roles: Roles, fields: int
) -> optax.GradientTransformationExtraArgs:
    seen = seen_by(inner, lambda path, shape: roles[keystr(path)].axes)

    def kind(path: KeyPath, shape: tuple[int, ...]) -> Hashable:
        role = roles[keystr(path)]
        view = shape if role.axes is None else role.axes.view_shape(shape)
        return (role.axes, role.numbers) if len(view) == 2 else None

    # Groups first, so that only the leaves of one are turned round at a time.
    return sequence(seen, fields=fields, alike=kind)


def _without_frozen(tree: Any, roles: Roles) -> Any:
    """Returns a tree with `None`, an absent leaf, for frozen parameters."""

    def keep(path: KeyPath, x: Any) -> Any:
        return None if _is_frozen(roles[keystr(path)]) else x

    return jax.tree.map_with_path(keep, tree)


def _is_frozen(role: Role) -> bool:
    return role.label == "frozen"


def _with_frozen(
    updates: Any, frozen: Any, new: Any, fill: Callable[[Any], Any]
) -> Any:
    """Returns new updates in the tree of the old ones, filled up for frozen leaves."""
    found = {keystr(path): x for path, x in jax.tree.leaves_with_path(new)}
    leaves = [
        found[keystr(path)] if keystr(path) in found else fill(x)
        for path, x in jax.tree.leaves_with_path(frozen)
    ]
    return jax.tree.structure(updates).unflatten(leaves)


def _unchanged(grad: Any) -> Any:
    """Returns the update of a frozen leaf."""
    is_float = hasattr(grad, "dtype") and jnp.issubdtype(grad.dtype, jnp.inexact)
    return jnp.zeros_like(grad) if is_float else grad


def _require_gradients(grads: Any, params: Any) -> None:
    paths = lambda tree: {keystr(path) for path, _ in jax.tree.leaves_with_path(tree)}
    missing = sorted(paths(params) - paths(grads))
    if missing:
        raise ValueError(
            "these parameters have no gradient:\n  " + "\n  ".join(missing) + "\nLabel "
            'them "frozen", or leave them out of the parameters at `init` too.'
        )
