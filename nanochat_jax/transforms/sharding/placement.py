"""Where the parameters of an update lie, and constraints that follow.

On a mesh of Explicit axes the types of arrays tell their shardings. On one of Auto axes
they do not, and `distribute` hands a `Placement` to `update` as an extra argument.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding
from jax.tree_util import KeyPath, keystr
from jaxtyping import Array

from nanochat_jax.transforms.axes import ResolvedAxes
from nanochat_jax.transforms.sharding import specs


class _Place(NamedTuple):
    """Shape and sharding of a parameter."""

    shape: tuple[int, ...]
    sharding: NamedSharding


@dataclasses.dataclass(frozen=True)
class Placement:
    """Shapes and shardings of parameters, by path.

    Transforms take one as the extra argument `placement` of `update`, and hand it on.

    Attributes:
      places: Shape and sharding by path; empty if nothing is known.
    """

    places: Mapping[str, _Place] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, params: Any, shardings: Any) -> "Placement":
        """Returns the placement of parameters.

        Args:
          params: Parameters, or a tree with their paths and shapes.
          shardings: Tree of `NamedSharding`s. A parameter without one is left out.
        """
        known = {keystr(path): s for path, s in jax.tree.leaves_with_path(shardings)}
        leaves = jax.tree.leaves_with_path(params)
        shapes = {keystr(path): x.shape for path, x in leaves}
        names = shapes.keys() & known.keys()
        return cls({name: _Place(shapes[name], known[name]) for name in names})

    def viewed(self, views: Mapping[str, ResolvedAxes]) -> "Placement":
        """Returns the placement of parameters that are seen as matrices.

        Args:
          views: Views by path. Parameters without one are seen as they are.
        """
        places = dict(self.places)
        for name in views.keys() & places.keys():
            view, sharding = views[name], places[name].sharding
            places[name] = _Place(view.view_shape, specs.viewed(view, sharding))
        return Placement(places)

    def sharding(self, path: KeyPath, x: Array) -> NamedSharding | None:
        """Returns the sharding of a leaf of the updates, if it is known.

        Args:
          path: Its path, which is that of its parameter.
          x: The leaf, as large as the parameter or projected.
        """
        place = self.places.get(keystr(path))
        return place and specs.derived(x.shape, place.shape, place.sharding)

    @property
    def devices(self) -> int:
        """Number of devices of the mesh; 1 if nothing is known."""
        sizes = (place.sharding.mesh.size for place in self.places.values())
        return max(sizes, default=1)


NOWHERE = Placement()
"""Placement of parameters of which nothing is known."""


def split_long(x: Array, sharding: NamedSharding | None) -> Array:
    """Constrains each device to all of the shorter axis and part of the longer one.

    Then products of `X`, shorter axis first, with `Xᵀ` and what comes of it are added
    up over devices, and none is sent all of `X`.

    Args:
      x: Matrices, `[*batch, m, n]`.
      sharding: Their sharding, if it is known.
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


def beside(basis: Array | None, g: Array, sharding: NamedSharding | None) -> Any:
    """Constrains each device to the rows of a basis by which it multiplies.

    Args:
      basis: Basis `[*batch, short, r]` of the shorter axis of a leaf, if it has one.
      g: The leaf.
      sharding: Its sharding, if it is known.
    """
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
