"""Run updates of arrays on Explicit mesh axes in Auto mode.

So that there is one implementation for both kinds of axes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jaxtyping import Array

from nanochat_jax.transforms.axes import ResolvedAxes
from nanochat_jax.transforms.sharding import specs
from nanochat_jax.transforms.sharding.placement import Placement

Update = Callable[..., tuple[Any, Any]]
"""The `update` of a transform."""


def in_auto_mode(update: Update) -> Update:
    """Returns an update that also takes arrays on a mesh of Explicit axes.

    Its results are sharded as its arguments: updates as the parameters, or as the
    updates if there are none, and the state as the state.

    Args:
      update: Update that is told shardings by the extra argument `placement`.
    """

    @functools.wraps(update)
    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        mesh = _explicit_mesh((updates, state, params))
        if mesh is None:
            return update(updates, state, params, **extra_args)
        like = updates if params is None else params
        sharding = lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec)
        out = jax.tree.map(sharding, (like, state))
        # Arrays have to be arguments; what is static must not be.
        arrays = {k: v for k, v in extra_args.items() if isinstance(v, jax.Array)}
        static = {k: v for k, v in extra_args.items() if k not in arrays}
        static["placement"] = Placement.of(like, out[0])
        run: Any = jax.sharding.auto_axes(
            lambda u, s, p, arrays: update(u, s, p, **arrays, **static),
            out_sharding=out,
        )
        return run(updates, state, params, arrays)

    return update_fn


def sharded_as(encode: Callable[[Array], Any], x: Array) -> Any:
    """Returns `encode(x)`, whose arrays are sharded as `x` where its axes are Explicit.

    Args:
      encode: Function to arrays with as many axes as `x` has.
      x: Its argument.
    """
    if _explicit_mesh(x) is None:
        return encode(x)
    shapes = jax.eval_shape(encode, jax.ShapeDtypeStruct(x.shape, x.dtype))
    out = jax.tree.map(lambda y: specs.fit(y.shape, jax.typeof(x).sharding), shapes)
    run: Any = jax.sharding.auto_axes(encode, out_sharding=out)
    return run(x)


def seen_as(view: ResolvedAxes, x: Array) -> Array:
    """Returns a leaf as matrices, sharded as the view where axes are Explicit.

    Args:
      view: The view.
      x: The leaf.
    """
    if _explicit_mesh(x) is None:
        return view.to_view(x)
    out = specs.viewed(view, jax.typeof(x).sharding)
    run: Any = jax.sharding.auto_axes(view.to_view, out_sharding=out)
    return run(x)


def _explicit_mesh(tree: Any) -> Any:
    """Returns the mesh of Explicit axes that arrays are on, if there is one."""
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree))
    explicit = (mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types)
    return next(explicit, None)
