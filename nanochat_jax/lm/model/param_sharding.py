"""The mesh of devices `data x fsdp x tensor`, and the shardings of parameters on it.

Sequences are divided over `data` and `fsdp`, see `activation_sharding`, and parameters

  * over `fsdp` by rows, and gathered where they are used (Rajbhandari et al. 2020,
    "ZeRO", stage 3). By rows, since entries of a row share the scales of codes: the
    state is then encoded and decoded without collectives. By columns only where
    `tensor` divides the rows;
  * over `tensor` along the axis that is not the residual stream, so that a device has
    some of the heads, hidden units and tokens of the vocabulary (Shoeybi et al. 2019,
    "Megatron-LM"). The layers declare this axis in their `tensor_splits`.

Gradients and state of the optimizer are divided as parameters are.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath, keystr

from nanochat_jax.config import MESH_AXES, Config, ModelConfig, schema
from nanochat_jax.lm.model.block import Attention, FeedForward, TensorSplit
from nanochat_jax.lm.model.gpt import GPT
from nanochat_jax.lm.model.layer_stacking import Params
from nanochat_jax.transforms import specs

_SPLITS = GPT.tensor_splits | Attention.tensor_splits | FeedForward.tensor_splits

# Messages for axes that do not divide a matrix, where the default does not apply.
_REMEDY = {
    ("embedding", "fsdp"): "its columns are divided in their place, and state that is "
    "quantised takes more on each device. `pad_vocab_to = 128` mends it",
}


class _Cut(NamedTuple):
    """A division of the rows, columns or heads of a matrix among devices."""

    axis: str
    devices: int
    units: int
    kind: str

    @property
    def fits(self) -> bool:
        return self.units % self.devices == 0

    @property
    def divides(self) -> bool:
        return self.fits and self.devices > 1


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """Returns the mesh of all devices, of all processes.

    Args:
      sizes: Devices along the axes; 1 along missing ones.

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
    """Returns a mesh without devices, for `place`.

    Args:
      sizes: Devices along the axes; 1 along missing ones.
    """
    axes = full(sizes)
    types = (AxisType.Auto,) * len(axes)
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=types)


def place(params: Params, mesh: Mesh | AbstractMesh, config: ModelConfig) -> Params:
    """Returns shapes and types of parameters with their shardings.

    Vectors are replicated. A mesh axis that does not divide a matrix along the wanted
    axis divides the other one, or none; `mesh_summary` names them.

    Args:
      params: Parameters of the model, as shapes and types.
      mesh: Mesh of the axes `MESH_AXES`.
      config: Shape of the model.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def at(path: KeyPath, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding, split = replicated, _split(path)
        if split is not None:
            tensor, fsdp = _cuts(split, x, mesh.shape, config)
            axes: dict[str, tuple[str, ...]] = {"rows": (), "columns": ()}
            # Axes of one device are dropped, so that equal placements compare equal.
            if tensor.divides:
                axes[split.axis] = ("tensor",)
            if fsdp.devices > 1:
                axes[fsdp.kind] = ("fsdp",)
            matrix = specs.fit(x.shape[-2:], replicated, tuple(axes.values()))
            batch = [()] * (x.ndim - 2)
            sharding = specs.with_axes(replicated, [*batch, *specs.axes_of(matrix, 2)])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map_with_path(at, params)


def mesh_summary(params: Params, config: Config) -> str:
    """Returns in words the mesh of a run, and the matrices that it does not divide.

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
        f"  {cut.axis} does not divide the {cut.units} {cut.kind} of `{_name(path)}`: "
        f"{_REMEDY.get((_name(path), cut.axis), 'such matrices are whole along it')}"
        for path, x in jax.tree.leaves_with_path(params)
        if (split := _split(path)) is not None
        for cut in _cuts(split, x, sizes, config)
        if not cut.fits
    }
    return "\n".join([f"Mesh:   {_product(sizes)}{where}", *sorted(lines)])


def full(sizes: Mapping[str, int]) -> dict[str, int]:
    """Returns the devices along all axes of the mesh.

    Args:
      sizes: Devices along the axes; 1 along missing ones.
    """
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


def _product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


def _name(path: KeyPath) -> str:
    """Returns the name of a parameter: of its layer, if it is a kernel."""
    *_, layer, name = keystr(path, simple=True, separator="/").split("/")
    return layer if name == "kernel" else name


def _split(path: KeyPath) -> TensorSplit | None:
    """Returns the declared split of a matrix, `None` for a vector."""
    name = _name(path)
    if name != "scale" and name not in _SPLITS:
        raise ValueError(
            f"{keystr(path)}: no sharding is declared for it. Add `{name}` to the "
            "`tensor_splits` of its module."
        )
    return _SPLITS.get(name)


def _cuts(
    split: TensorSplit,
    x: jax.ShapeDtypeStruct,
    sizes: Mapping[str, int],
    config: ModelConfig,
) -> tuple[_Cut, _Cut]:
    """Returns the wanted cuts of a matrix, by `tensor` and by `fsdp`."""
    entries = dict(zip(("rows", "columns"), x.shape[-2:], strict=True))
    units, kind = entries[split.axis], split.axis
    if split.heads:
        units, kind = getattr(config, split.heads), "heads"
    tensor = _Cut("tensor", sizes["tensor"], units, kind)
    rest = "columns" if split.axis == "rows" and tensor.divides else "rows"
    return tensor, _Cut("fsdp", sizes["fsdp"], entries[rest], rest)
