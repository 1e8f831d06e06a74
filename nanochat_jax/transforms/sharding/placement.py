"""Where the parameters of an update lie, for transforms that have to know.

On a mesh of Explicit axes the types of arrays tell. On one of Auto axes they do not,
and `distribute` says it instead. Either way the shardings are known by path while an
update is traced, and the update itself is traced in Auto mode, so that there is one
implementation for both.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding
from jax.tree_util import KeyPath, keystr
from jaxtyping import Array

from nanochat_jax.transforms.axes import ResolvedAxes
from nanochat_jax.transforms.sharding import specs

Update = Callable[..., tuple[Any, Any]]
"""The `update` of a transform."""


class _Place(NamedTuple):
    """Shape and sharding of a parameter."""

    shape: tuple[int, ...]
    sharding: NamedSharding


_PLACES: ContextVar[Mapping[str, _Place]] = ContextVar("_PLACES", default={})  # noqa: B039


@contextlib.contextmanager
def using(params: Any, shardings: Mapping[str, NamedSharding]) -> Iterator[None]:
    """Makes known where parameters lie, while an update is traced.

    Args:
      params: The parameters, or what has their paths and shapes.
      shardings: Shardings by path; of parameters without one nothing is known.
    """
    shapes = {keystr(path): x.shape for path, x in jax.tree.leaves_with_path(params)}
    known = shapes.keys() & shardings.keys()
    token = _PLACES.set({name: _Place(shapes[name], shardings[name]) for name in known})
    try:
        yield
    finally:
        _PLACES.reset(token)


@contextlib.contextmanager
def viewed(views: Mapping[str, ResolvedAxes]) -> Iterator[None]:
    """Makes known where parameters lie that are seen as matrices.

    Args:
      views: Views by path; parameters without one are seen as they are.
    """
    places = dict(_PLACES.get())
    for name in views.keys() & places.keys():
        view, sharding = views[name], places[name].sharding
        places[name] = _Place(view.view_shape, specs.viewed(view, sharding))
    token = _PLACES.set(places)
    try:
        yield
    finally:
        _PLACES.reset(token)


def seen_as(view: ResolvedAxes, x: Array) -> Array:
    """Returns a leaf as matrices, sharded as the view is where axes are Explicit.

    Args:
      view: The view.
      x: The leaf.
    """
    if _explicit_mesh(x) is None:
        return view.to_view(x)
    out = specs.viewed(view, jax.typeof(x).sharding)
    run: Any = jax.sharding.auto_axes(view.to_view, out_sharding=out)
    return run(x)


def of(path: KeyPath, x: Array) -> NamedSharding | None:
    """Returns how a leaf of the updates is sharded, if that is known.

    Args:
      path: Its path, which is that of its parameter.
      x: The leaf, as large as the parameter or projected.
    """
    place = _PLACES.get().get(keystr(path))
    return place and specs.derived(x.shape, place.shape, place.sharding)


def device_count() -> int:
    """Returns the number of devices of the mesh that parameters are known to be on."""
    places = _PLACES.get().values()
    return max((place.sharding.mesh.size for place in places), default=1)


def split_long(x: Array, sharding: NamedSharding | None) -> Array:
    """Asks for each device to have all of the shorter axis and some of the longer one.

    Then products of `X`, shorter axis first, with `Xᵀ` and what comes of it are added
    up over devices, and none is sent all of `X`.

    Args:
      x: Matrices, `[*batch, m, n]`.
      sharding: How they are sharded, if that is known.
    """
    if sharding is None:
        return x
    *batch, rows, columns = specs.axes_of(sharding, x.ndim)
    if x.shape[-2] <= x.shape[-1]:
        rows, columns = (), (*columns, *rows)
    else:
        rows, columns = (*rows, *columns), ()
    return constrain(x, specs.fit(x.shape, sharding, (*batch, rows, columns)))


def is_split(sharding: NamedSharding | None) -> bool:
    """Returns whether single matrices are known to be on several devices."""
    if sharding is None:
        return False
    rows, columns = specs.axes_of(sharding, len(sharding.spec))[-2:]
    return specs.ways(sharding, (*rows, *columns)) > 1


def beside(basis: Array | None, path: KeyPath, g: Array) -> Array | None:
    """Asks for each device to have the rows of a basis by which it multiplies.

    Args:
      basis: Basis `[*batch, short, r]` of the shorter axis of a leaf, if it has one.
      path: Path of the leaf.
      g: The leaf.
    """
    sharding = of(path, g)
    if sharding is None or basis is None:
        return basis
    *batch, rows, columns = specs.axes_of(sharding, g.ndim)
    short = rows if g.shape[-2] <= g.shape[-1] else columns
    where = specs.fit(basis.shape, sharding, (*batch, short, ()))
    return constrain(basis, where)


def constrain(x: Array, sharding: NamedSharding) -> Array:
    """Returns `x` with that sharding."""
    mesh = jax.sharding.get_abstract_mesh()
    # In Auto mode under an Explicit mesh only the mesh of the context will do.
    where = sharding if mesh.empty else sharding.spec
    if AxisType.Explicit in mesh_of(sharding).axis_types:
        return jax.sharding.reshard(x, where)
    return jax.lax.with_sharding_constraint(x, where)


def mesh_of(sharding: NamedSharding) -> Any:
    """Returns the mesh for `jax.shard_map`: that of the context, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    return sharding.mesh if mesh.empty else mesh


def in_auto_mode(update: Update) -> Update:
    """Returns an update that also takes arrays on a mesh of Explicit axes.

    What it returns is sharded as what it was given: updates as the parameters, or as
    the updates if there are none, and the state as the state.
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
        known = {keystr(path): s for path, s in jax.tree.leaves_with_path(out[0])}
        # Arrays have to be arguments; what is static must not be.
        arrays = {k: v for k, v in extra_args.items() if isinstance(v, jax.Array)}
        static = {k: v for k, v in extra_args.items() if k not in arrays}
        with using(like, known):
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


def _explicit_mesh(tree: Any) -> Any:
    """Returns the mesh of Explicit axes that arrays are on, if there is one."""
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree))
    explicit = (mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types)
    return next(explicit, None)
