"""The mesh of devices `data x fsdp x tensor`, and where parameters lie on it.

Sequences are divided over `data` and `fsdp`, as `spread.py` has it, and parameters

  * over `fsdp` along their rows, and gathered where they are used (Rajbhandari et al.
    2020, "ZeRO", stage 3). Rows, since entries of a row share the scales of codes:
    state is then stored and read without a word between devices. Along their columns
    only where `tensor` divides the rows;
  * over `tensor` along the axis that is not the residual stream, so that a device has
    some of the heads, hidden units and tokens of the vocabulary (Shoeybi et al. 2019,
    "Megatron-LM").

Gradients and state of the optimizer are divided as parameters are.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath, keystr

from nanochat_jax.config import MESH_AXES, Config, ModelConfig, schema
from nanochat_jax.lm.model.layer_stacking import Params
from nanochat_jax.transforms import specs

# Whether `tensor` divides the rows or the columns of a matrix, by the part it plays.
_TENSOR = {
    "embedding": "rows",
    "query": "columns",
    "key": "columns",
    "value": "columns",
    "out": "rows",
    "gate": "columns",
    "up": "columns",
    "down": "rows",
    "head": "columns",
}
# Where it divides heads, none of which is cut in two.
_HEADS = {"query": "n_heads", "key": "kv_heads", "value": "kv_heads", "out": "n_heads"}

# What to say of a mesh axis that does not divide it, in place of the usual.
_REMEDY = {
    ("embedding", "fsdp"): "its columns are divided in their place, and state that is "
    "quantised takes more on each device. `pad_vocab_to = 128` mends it",
}


class _Cut(NamedTuple):
    """A division of some of the units of a matrix, among the devices of a mesh axis."""

    axis: str
    among: int
    units: int
    what: str

    @property
    def fits(self) -> bool:
        return self.units % self.among == 0


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """Returns the mesh of all devices, those of other processes among them.

    Args:
      sizes: Devices along the axes; 1 along those that are not given.

    Raises:
      ValueError: If there are not as many devices.
    """
    axes = full(sizes)
    wanted, found = math.prod(axes.values()), jax.device_count()
    schema.require(
        (
            wanted == found,
            f"`mesh` is {_product(axes)}, which takes {wanted} devices, but there are "
            f"{found} in {jax.process_count()} processes. Set its axes so that their "
            f"product is {found}, such as `--mesh fsdp={found}`, or start as many "
            "processes as it takes. On the CPU, `JAX_NUM_CPU_DEVICES` sets how many "
            "devices there are.",
        )
    )
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """Returns a mesh without devices, for `place`; `sizes` as for `make_mesh`."""
    axes = full(sizes)
    types = (AxisType.Auto,) * len(axes)
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=types)


def place(params: Params, mesh: Mesh | AbstractMesh, config: ModelConfig) -> Params:
    """Returns shapes and types of parameters with their shardings.

    Vectors are whole on every device. An axis of the mesh that does not divide a matrix
    so divides it otherwise, or not at all; `describe` names these.

    Args:
      params: Parameters of the model, as shapes and types.
      mesh: Mesh of the axes `MESH_AXES`.
      config: Shape of the model.
    """
    whole = NamedSharding(mesh, PartitionSpec())

    def at(path: KeyPath, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        role, sharding = _role(path), whole
        if role is not None and x.ndim > 1:
            tensor, *_ = _cuts(role, x, mesh.shape, config)
            # Axes of one device are left out: kernels that lie alike are to look alike.
            fsdp = ("fsdp",) * (mesh.shape["fsdp"] > 1)
            kept = ("tensor",) * (tensor.fits and tensor.among > 1)
            rows, columns = (kept, ()) if _TENSOR[role] == "rows" else ((), kept)
            axes = (rows, fsdp) if rows else (fsdp, columns)
            matrix = specs.fit(x.shape[-2:], whole, axes)
            batch = [()] * (x.ndim - 2)
            sharding = specs.with_axes(whole, [*batch, *specs.axes_of(matrix, 2)])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

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
    sizes = full(config.mesh)
    where = f" in {processes} processes" if processes > 1 else ""
    lines = {
        f"  {cut.axis} does not divide the {cut.units} {cut.what} of `{role}`: "
        f"{_REMEDY.get((role, cut.axis), 'such matrices are whole along it')}"
        for path, x in jax.tree.leaves_with_path(params)
        if (role := _role(path)) is not None and x.ndim > 1
        for cut in _cuts(role, x, sizes, config)
        if not cut.fits
    }
    return "\n".join([f"Mesh:   {_product(sizes)}{where}", *sorted(lines)])


def full(sizes: Mapping[str, int]) -> dict[str, int]:
    """Returns the devices along all axes, 1 along those that are not given."""
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


def _product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


def _role(path: KeyPath) -> str | None:
    names = keystr(path, simple=True, separator="/").split("/")
    return next((name for name in names if name in _TENSOR), None)


def _cuts(
    role: str, x: jax.ShapeDtypeStruct, sizes: Mapping[str, int], config: ModelConfig
) -> tuple[_Cut, _Cut]:
    """Returns the cuts that are wanted of a matrix, by `tensor` and by `fsdp`."""
    rows, columns = x.shape[-2:]
    units, what = (rows, "rows") if _TENSOR[role] == "rows" else (columns, "columns")
    if role in _HEADS:
        units, what = getattr(config, _HEADS[role]), "heads"
    tensor = _Cut("tensor", sizes["tensor"], units, what)
    by_columns = _TENSOR[role] == "rows" and tensor.fits and tensor.among > 1
    size, what = (columns, "columns") if by_columns else (rows, "rows")
    return tensor, _Cut("fsdp", sizes["fsdp"], size, what)
