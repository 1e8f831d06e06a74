"""The part every parameter plays, and which of its axes are a matrix.

One function settles both, for `muon`, `build_optimizer`, `describe`, reports and
counts of operations. Its sources are, in this order: the user; the module classes in
the tree; names, shapes and siblings, where they leave no doubt. A leaf that is still
open then is refused.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, keystr

from nanochat_jax import interop
from nanochat_jax.config import Group
from nanochat_jax.optimizer.groups import groups_of, in_group, require_use
from nanochat_jax.optimizer.roles.freeze import frozen_by
from nanochat_jax.optimizer.roles.given import (
    Label,
    entries,
    finder,
    given_axes,
    given_labels,
)
from nanochat_jax.optimizer.roles.layouts import Reading, read_tree
from nanochat_jax.transforms import MatrixAxes


@dataclasses.dataclass(frozen=True)
class Role:
    """The part a parameter plays for an optimizer.

    Attributes:
      label: `"matrix"`, `"embedding"`, `"head"`, `"vector"`, or `"frozen"`, which has
        no state and is not changed.
      reason: The source of label and axes, in a few words.
      axes: Axes of its matrices, if it is a matrix.
      assumed: Whether two axes were taken as `(fan_in, fan_out)`, as nothing says
        otherwise.
      group: Group that it is in, if it is in one.
      usual: Label without that group; `None` if it is the same.
    """

    label: Label
    reason: str
    axes: MatrixAxes | None = None
    assumed: bool = False
    group: Group | None = None
    usual: Label | None = None

    @property
    def numbers(self) -> tuple[str | None, bool]:
        """What its rates and decays follow from: its group, and whether it decays."""
        return (self.group.match if self.group else None), self.decays

    @property
    def decays(self) -> bool:
        """Whether weight decay for everything but vectors is for it."""
        return (self.usual or self.label) != "vector"


def settle(
    params: optax.Params,
    *,
    labels: Any = None,
    matrix_axes: Any = None,
    freeze: Collection[str] = (),
    groups: Sequence[Group] = (),
    refuse: bool = True,
) -> dict[str, Role]:
    """Settles the label of every parameter and the axes of every matrix.

    Example:
      >>> shape = jax.ShapeDtypeStruct((64, 4, 16), jnp.float32)
      >>> params = {"attend": {"key": {"kernel": shape, "bias": jnp.ones((4, 16))}}}
      >>> given = {"attend": {"key": {"kernel": MatrixAxes(0, (1, 2)), "bias": None}}}
      >>> roles = settle(params, matrix_axes=given)
      >>> [(role.label, role.reason) for role in roles.values()]
      [('vector', 'name'), ('matrix', 'given')]

    Args:
      params: Parameters: arrays or `jax.ShapeDtypeStruct`s, in any tree. Modules of
        Equinox and Haliax tell the axes of their leaves. Leaves that are not
        floating-point arrays are frozen.
      labels: Labels that stand before all else: a tree like the parameters, or a prefix
        of it, of labels or `None`, or a function from parameters to one.
      matrix_axes: Axes, as for `as_matrices`, or what `matrix_axes(model)` returned,
        which has labels too; `None` in it leaves a leaf to names and classes.
      freeze: Patterns on paths of parameters that are frozen, as for `frozen_by`.
      groups: Groups of parameters, whose optimizers and freezing stand before labels.
      refuse: Whether to refuse leaves that are left open; if not, they are matrices
        without axes, for reports.

    Returns:
      The role of each leaf, by path as `jax.tree_util.keystr` gives it.

    Raises:
      TypeError: If a leaf is complex, or an entry of `matrix_axes` is not axes.
      ValueError: If a label is not known, or the axes of a matrix are not; if a pattern
        of `freeze` or a group matches nothing, or a group has settings for none of its
        parameters.
    """
    flat = jax.tree.leaves_with_path(params)
    frozen, grouped = frozen_by(freeze, params, groups), groups_of(groups, params)
    wanted = given_labels(labels, params)
    axes = given_axes(matrix_axes, params)
    derived = finder(entries(interop.in_tree(params)))
    arrays = {path: x for path, x in flat if not _why_frozen(x)}
    readings = read_tree({path: x.shape for path, x in arrays.items()})
    roles = {}
    for path, x in flat:
        why = _why_frozen(x)
        group = grouped.get(keystr(path))
        if not why and keystr(path) in frozen:
            by_group = group is not None and group.freeze
            why = f"{'group' if by_group else '`freeze`'} {frozen[keystr(path)]!r}"
        if why:
            roles[keystr(path)] = Role("frozen", why)
            continue
        said = axes(path, x.shape)
        said = (said, "given") if said is not None else (derived(path), "module")
        role = _role(wanted(path), *said, readings[path], len(x.shape))
        role = in_group(role, group, readings[path].axes, len(x.shape))
        roles[keystr(path)] = _checked(role, path, x.shape)
    if refuse:
        shapes = {keystr(path): getattr(x, "shape", ()) for path, x in flat}
        require_use(groups, shapes, roles)
        _refuse_complex(arrays, roles)
        _refuse_open(flat, roles)
    return roles


def label_params(
    params: optax.Params,
    labels: Any = None,
    matrix_axes: Any = None,
    freeze: Collection[str] = (),
    groups: Sequence[Group] = (),
) -> optax.Params:
    """Labels every parameter by the part it plays.

    Biases, gains of norms and whatever has fewer than two axes are `"vector"`s;
    embeddings and heads go by names; leaves that are not floating-point arrays are
    `"frozen"`; the others are matrices.

    Example:
      >>> kernel = jnp.zeros((8, 8))
      >>> label_params({"embed": {"embedding": kernel}, "up": {"kernel": kernel}})
      {'embed': {'embedding': 'embedding'}, 'up': {'kernel': 'matrix'}}

    Args:
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.
      labels: As for `build_optimizer`.
      matrix_axes: As for `build_optimizer`.
      freeze: As for `settle`.
      groups: As for `settle`.

    Returns:
      A tree like `params`, of labels.

    Raises:
      ValueError: As `build_optimizer`.
    """
    roles = settle(
        params, labels=labels, matrix_axes=matrix_axes, freeze=freeze, groups=groups
    )
    return jax.tree.map_with_path(lambda path, _: roles[keystr(path)].label, params)


def matrices_of(params: optax.Params, roles: Mapping[str, Role]) -> optax.Params:
    """Returns shapes and types of the matrices, as they are seen.

    Args:
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.
      roles: Their roles.

    Returns:
      A tree like `params`, with `None` for leaves that are no matrix.
    """

    def seen(path: KeyPath, x: Any) -> jax.ShapeDtypeStruct | None:
        role = roles[keystr(path)]
        if role.label != "matrix" or role.axes is None:
            return None
        return jax.ShapeDtypeStruct(role.axes.view_shape(x.shape), x.dtype)

    return jax.tree.map_with_path(seen, params)


def _role(
    label: Label | None, said: Any, source: str, reading: Reading, ndim: int
) -> Role:
    """Returns a role from the user, the modules or the names, in that order.

    Args:
      label: Label that the user gives, if any.
      said: Axes or label that the user or a module gives, if any.
      source: Who gives it.
      reading: What names and shapes tell.
      ndim: Number of axes of the leaf.
    """
    if label is not None and label != "matrix":
        return Role(label, "given")
    if isinstance(said, str):  # as `matrix_axes(model)` returns
        return Role(said, "module")  # pyright: ignore[reportArgumentType]
    if said is not None:
        # An output layer is a linear map like others: only its name tells.
        by_class = bool(said.source)
        if by_class and label is None and reading.label == "head":
            return Role("head", reading.reason)
        return Role("matrix", said.source or source, said)
    if label is None and reading.label not in ("matrix", None):
        return Role(reading.label, reading.reason)  # pyright: ignore[reportArgumentType]
    # One without axes is refused later, together with all others.
    if label == "matrix" and reading.axes is None and ndim == 2:
        return Role("matrix", "given", MatrixAxes(0, 1), assumed=True)
    return Role("matrix", reading.reason, reading.axes, reading.assumed)


def _checked(role: Role, path: KeyPath, shape: tuple[int, ...]) -> Role:
    """Returns a role whose axes are there in the leaf, or still open."""
    if role.label == "matrix" and role.axes is not None:
        try:
            role.axes.resolve(shape)
        except ValueError as error:
            raise ValueError(f"{keystr(path)}: {error}") from None
    return role


def _why_frozen(x: Any) -> str:
    """Returns why a leaf cannot be trained, or nothing."""
    if not hasattr(x, "dtype"):
        return f"not an array, but of type {type(x).__name__}"
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return f"not floating point, but {x.dtype}"
    return ""


def _refuse_complex(arrays: Mapping[KeyPath, Any], roles: Mapping[str, Role]) -> None:
    found = [
        f"  {keystr(path)} is {x.dtype}"
        for path, x in arrays.items()
        if jnp.issubdtype(x.dtype, jnp.complexfloating)
        and roles[keystr(path)].label != "frozen"
    ]
    if found:
        raise TypeError(
            "parameters must be real, but\n" + "\n".join(found) + "\nWrap the "
            "optimizer in `optax.contrib.split_real_and_imaginary`, or label them "
            '"frozen".'
        )


def _refuse_open(flat: Any, roles: Mapping[str, Role]) -> None:
    """Refuses the leaves whose axes nothing tells, all in one message."""
    offenders = [
        (keystr(path), x.shape, roles[keystr(path)])
        for path, x in flat
        if roles[keystr(path)].label == "matrix" and roles[keystr(path)].axes is None
    ]
    if not offenders:
        return
    lines = [f"  {name} {shape}: {role.reason}" for name, shape, role in offenders]
    raise ValueError(
        "the axes that make a matrix are not known of\n"
        + "\n".join(lines)
        + "\nMuon on other axes trains worse, or not at all. Go on in one of three "
        "ways: declare the axes in `matrix_axes`, a tree like the parameters of "
        "`MatrixAxes(fan_in=..., fan_out=...)` or a function of path and shape; derive "
        "them, `matrix_axes=nanochat_jax.matrix_axes(model)`; or send these leaves to "
        'AdamW, with the label "vector" in `labels`.'
    )
