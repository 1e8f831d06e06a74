"""Run a transform on leaves of any shape, seen as matrices."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import optax
from jax.tree_util import KeyPath, keystr
from jaxtyping import Array

from nanochat_jax.transforms import record
from nanochat_jax.transforms.axes import MatrixAxes, ResolvedAxes, as_axes
from nanochat_jax.transforms.sharding import (
    NOWHERE,
    Entries,
    Placement,
    in_auto_mode,
    laid_out,
    layout,
    seen_as,
)

AxesRule = Callable[[str, tuple[int, ...]], MatrixAxes | None]
"""A function from path, such as `"block/query/kernel"`, and shape to axes."""

PathRule = Callable[[KeyPath, tuple[int, ...]], MatrixAxes | None]
"""The same, of the path as JAX has it."""


def as_matrices(
    inner: optax.GradientTransformation, axes: Any
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on leaves seen as matrices, `[*batch, fan_in, fan_out]`.

    Muon, GaLore and the shape factors act on the last two axes of a leaf. A kernel of
    attention, `[features, heads, head_dim]`, is one matrix of `features` by `heads *
    head_dim` in three axes; a kernel `[out, in]` is one turned round. Here both are
    given to `inner` as the matrices they are, at `init` and at `update`, parameters
    too; updates come back in the shape of the leaf. The state has the
    shapes of the view, so that a basis has the rank it should and blocks of codes
    run along the right axis.

    Merging neighbouring axes costs nothing; axes in another order are transposed. A
    merged axis is sharded as the first of its parts.

    Example:
      >>> params = {"query": jnp.ones((64, 4, 16)), "out": jnp.ones((4, 16, 64))}
      >>> axes = {"query": MatrixAxes(0, (1, 2)), "out": MatrixAxes((0, 1), 2)}
      >>> tx = as_matrices(optax.chain(momentum(), orthogonalize()), axes)
      >>> state = tx.init(params)
      >>> state[0].momentum["query"].shape, state[0].momentum["out"].shape
      ((64, 64), (64, 64))
      >>> updates, state = tx.update(params, state, params)
      >>> updates["query"].shape
      (64, 4, 16)

    Args:
      inner: Transform of matrices.
      axes: The axes of each leaf: a tree like the parameters, or a prefix of it, of
        `MatrixAxes`, `optax.contrib.MuonDimensionNumbers`, or `None` for leaves that
        are `[*batch, fan_in, fan_out]` already; or a function of path and shape, `f(
        "block/query/kernel", (64, 4, 16))`, that returns one of these.

    Returns:
      A transformation with the state of `inner`.

    Raises:
      TypeError: If `axes` holds something else.
      ValueError: At `init` and `update`, if a leaf has no axes in the tree, or not
        those that are named.
    """
    return seen_by(inner, axes_rule(axes))


def seen_by(
    inner: optax.GradientTransformation, rule: PathRule
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on leaves seen as matrices, as `as_matrices` does.

    Args:
      inner: Transform of matrices.
      rule: Axes of a leaf by its path and shape; `None` for a leaf as it is.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> optax.OptState:
        views = resolve(rule, params)
        record.tell(views=views)
        placement = layout().placement.viewed(views)
        with record.seen(views), laid_out(placement=placement):
            return inner.init(_map(views, seen_as, params))

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        placement: Placement = NOWHERE,
        entries: Mapping[str, Entries] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        stacks = {*(entries or ())}
        extra_args |= {"entries": entries} if entries else {}
        one = jax.tree.map_with_path(
            lambda path, x: x[0] if keystr(path) in stacks else x, updates
        )
        views = resolve(rule, one)
        new_updates, state = inner.update(
            _map(views, seen_as, updates, stacks),
            state,
            None if params is None else _map(views, seen_as, params, stacks),
            placement=placement.viewed(views),
            **extra_args,
        )
        return _map(views, ResolvedAxes.from_view, new_updates, stacks), state

    return optax.GradientTransformationExtraArgs(init_fn, in_auto_mode(update_fn))


def axes_rule(axes: Any) -> PathRule:
    """Returns the axes of a leaf as a function of its path and shape.

    Args:
      axes: As for `as_matrices`.

    Raises:
      TypeError: If an entry of `axes` is neither axes nor `None`.
    """
    if is_function(axes):
        rule: Any = axes

        def by_rule(path: KeyPath, shape: tuple[int, ...]) -> MatrixAxes | None:
            given = rule(keystr(path, simple=True, separator="/"), shape)
            return None if given is None else as_axes(given)

        return by_rule
    table = {
        keystr(path): None if node is None else as_axes(node)
        for path, node in jax.tree.leaves_with_path(axes, is_leaf=is_axes)
    }

    def by_tree(path: KeyPath, shape: tuple[int, ...]) -> MatrixAxes | None:
        del shape
        name = nearest(table, path)
        if name is None:
            raise ValueError(
                f"`axes` has no entry for the leaf {keystr(path)}; it has "
                f"{sorted(table)}. Add one, or give a function of path and shape."
            )
        return table[name]

    return by_tree


def nearest(names: Collection[str], path: KeyPath) -> str | None:
    """Returns which entry of a prefix tree a leaf belongs to, if to any.

    Args:
      names: Paths of the entries, as `keystr` has them.
      path: Path of the leaf.
    """
    above = (keystr(path[:i]) for i in range(len(path), -1, -1))
    return next((name for name in above if name in names), None)


def is_function(given: Any) -> bool:
    """Returns whether an argument is a function, not a tree.

    A tree that is an Equinox module can be called too.
    """
    return callable(given) and jax.tree_util.all_leaves([given], is_leaf=is_axes)


def resolve(rule: PathRule, tree: Any) -> dict[str, ResolvedAxes]:
    """Returns the view of each leaf that is not seen as it is, by path.

    Args:
      rule: Axes by path and shape.
      tree: Arrays, or their shapes.

    Raises:
      ValueError: If leaves have not the axes that are named; with all of them.
    """
    views, wrong = {}, []
    for path, x in jax.tree.leaves_with_path(tree):
        axes = rule(path, x.shape)
        if axes is None:
            continue
        try:
            view = axes.resolve(x.shape)
        except ValueError as error:
            wrong.append(f"  {keystr(path)} of shape {x.shape}: {error}")
            continue
        if not view.is_identity:
            views[keystr(path)] = view
    if wrong:
        raise ValueError("these leaves have not the axes given:\n" + "\n".join(wrong))
    return views


def _map(
    views: Mapping[str, ResolvedAxes],
    f: Callable[[ResolvedAxes, Array], Array],
    tree: Any,
    stacks: Collection[str] = (),
) -> Any:
    """Returns leaves seen in another shape, those of stacks one by one."""

    def apply(path: KeyPath, x: Array) -> Array:
        view = views.get(keystr(path))
        if view is None:
            return x
        one = functools.partial(f, view)
        return jax.vmap(one)(x) if keystr(path) in stacks else one(x)

    return jax.tree.map_with_path(apply, tree)


def is_axes(node: Any) -> bool:
    """Returns whether a node of a tree of axes is an entry, `None` included."""
    return (
        node is None or isinstance(node, MatrixAxes) or hasattr(node, "reduction_axis")
    )
