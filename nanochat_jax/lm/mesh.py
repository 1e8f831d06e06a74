"""The mesh of devices `data x fsdp x tensor`, and where parameters lie on it.

Sequences are divided over `data` and `fsdp`, as `spread.py` has it, and parameters

  * over `fsdp` along the axis of the residual stream, and gathered where they are used
    (Rajbhandari et al. 2020, "ZeRO", stage 3);
  * over `tensor` along the other axis, so that a device has some of the heads, hidden
    units and tokens of the vocabulary (Shoeybi et al. 2019, "Megatron-LM").

Gradients and state of the optimizer are divided as parameters are.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath, keystr

from nanochat_jax import settings
from nanochat_jax.config import Config, ModelConfig
from nanochat_jax.config.run import MESH_AXES
from nanochat_jax.lm.stacking import Params

# Mesh axes of the rows and columns of a matrix, by the part it plays.
_AXES = {
    "embedding": ("tensor", "fsdp"),
    "query": ("fsdp", "tensor"),
    "key": ("fsdp", "tensor"),
    "value": ("fsdp", "tensor"),
    "out": ("tensor", "fsdp"),
    "gate": ("fsdp", "tensor"),
    "up": ("fsdp", "tensor"),
    "down": ("tensor", "fsdp"),
    "head": ("fsdp", "tensor"),
}
# Where `tensor` divides heads, none of which is cut in two.
_HEADS = {"query": "n_heads", "key": "kv_heads", "value": "kv_heads", "out": "n_heads"}


class _Cut(NamedTuple):
    """A division of one axis of a matrix: by a mesh axis, of how many of what."""

    axis: str
    units: int
    what: str

    def fits(self, sizes: Mapping[str, int]) -> bool:
        return self.units % sizes[self.axis] == 0


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """Returns the mesh of all devices, those of other processes among them.

    Args:
      sizes: Devices along the axes; 1 along those that are not given.

    Raises:
      ValueError: If there are not as many devices.
    """
    full = _full(sizes)
    wanted, found = math.prod(full.values()), jax.device_count()
    settings.require(
        (
            wanted == found,
            f"`mesh` is {_product(full)}, which takes {wanted} devices, but there are "
            f"{found} in {jax.process_count()} processes. Set its axes so that their "
            f"product is {found}, such as `--mesh fsdp={found}`, or start as many "
            "processes as it takes. On the CPU, `JAX_NUM_CPU_DEVICES` sets how many "
            "devices there are.",
        )
    )
    types = (AxisType.Auto,) * len(full)
    return jax.make_mesh(tuple(full.values()), tuple(full), axis_types=types)


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """Returns a mesh without devices, for `place`; `sizes` as for `make_mesh`."""
    full = _full(sizes)
    types = (AxisType.Auto,) * len(full)
    return AbstractMesh(tuple(full.values()), tuple(full), axis_types=types)


def place(params: Params, mesh: Mesh | AbstractMesh, config: ModelConfig) -> Params:
    """Returns shapes and types of parameters with their shardings.

    Vectors are whole on every device. So is a matrix along an axis that the mesh does
    not divide; `describe` names these.

    Args:
      params: Parameters of the model, as shapes and types.
      mesh: Mesh of the axes `MESH_AXES`.
      config: Shape of the model.
    """

    def at(path: KeyPath, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = [
            cut.axis if cut.fits(mesh.shape) else None for cut in _cuts(path, x, config)
        ]
        spec = PartitionSpec(*[None] * (x.ndim - len(axes)), *axes)
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    return jax.tree.map_with_path(at, params)


def describe(params: Params, config: Config) -> str:
    """Returns in words what a run is spread over, and what its mesh does not divide.

    Args:
      params: Parameters of the run, from `place` if it has a mesh.
      config: Its settings.
    """
    devices, processes = jax.device_count(), jax.process_count()
    if not config.mesh:
        others = f"One device of {devices} is used; `--mesh fsdp={devices}` uses all."
        return others if devices > 1 else ""
    sizes = _full(config.mesh)
    where = f" in {processes} processes" if processes > 1 else ""
    lines = {
        f"  {cut.axis} does not divide the {cut.units} {cut.what} of `{_role(path)}`: "
        "such matrices are whole along it"
        for path, x in jax.tree.leaves_with_path(params)
        for cut in _cuts(path, x, config)
        if not cut.fits(sizes)
    }
    return "\n".join([f"Mesh:   {_product(sizes)}{where}", *sorted(lines)])


def _full(sizes: Mapping[str, int]) -> dict[str, int]:
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


def _product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


def _role(path: KeyPath) -> str | None:
    names = keystr(path, simple=True, separator="/").split("/")
    return next((name for name in names if name in _AXES), None)


def _cuts(path: KeyPath, x: jax.ShapeDtypeStruct, config: ModelConfig) -> list[_Cut]:
    """Returns the cuts of rows and columns that are wanted of a parameter."""
    role = _role(path)
    if role is None or x.ndim < 2:
        return []
    sizes = zip(_AXES[role], x.shape[-2:], ("rows", "columns"), strict=True)
    return [
        _Cut(axis, getattr(config, _HEADS[role]), "heads")
        if axis == "tensor" and role in _HEADS
        else _Cut(axis, size, what)
        for axis, size, what in sizes
    ]
