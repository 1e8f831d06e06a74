"""How the sequences of batches and activations are divided over a mesh of devices.

Axes: B sequences of a batch, S tokens of a sequence, D residual stream.
"""

import contextlib
import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from nanochat_jax.config import MESH_AXES, schema

BATCH_AXES = ("data", "fsdp")
"""Mesh axes that divide the sequences of a batch."""


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int) -> None:
    """Refuses a microbatch whose sequences the mesh does not divide.

    Args:
      mesh: Mesh of the axes `MESH_AXES`.
      batch_size: Sequences of a microbatch, B.

    Raises:
      ValueError: If `batch_size` is not a multiple of `data` x `fsdp`.
    """
    schema.require(
        (
            batch_size % _ways(mesh) == 0,
            "`batch_size` must be a multiple of `data` x `fsdp`, the axes of `mesh` "
            f"that divide its sequences, got {batch_size} and {_ways(mesh)}.",
        )
    )


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Returns how a batch `[..., B, S]` is divided; not at all if B cannot be."""
    rows = BATCH_AXES if shape[-2] % _ways(mesh) == 0 else None
    return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 2), rows))


def own_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Returns which of `count` sequences are on devices of this process, in order."""
    sharding = batch_sharding(mesh, (count, 1))
    places = sharding.addressable_devices_indices_map((count, 1)).values()
    rows = [np.arange(count)[index[0]] for index in places if index is not None]
    return np.unique(np.concatenate(rows))


def put_batch(mesh: Mesh, own: np.ndarray, count: int) -> Array:
    """Returns a batch on the devices of all processes.

    Args:
      mesh: Where to put it.
      own: Sequences that `own_rows` names, `[..., rows, S]`.
      count: Sequences of the whole batch, B.

    Returns:
      An array `[..., B, S]`.
    """
    shape = (*own.shape[:-2], count, own.shape[-1])
    return jax.make_array_from_process_local_data(
        batch_sharding(mesh, shape), own, shape
    )


@contextlib.contextmanager
def using(mesh: Mesh | None) -> Iterator[None]:
    """Makes `spread` divide activations over a mesh, while a function is traced."""
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh):
        yield


def spread(x: Array) -> Array:
    """Returns activations with their sequences divided over the mesh in use, if any.

    Without it the compiler may gather sequences rather than parameters.

    Args:
      x: Activations, `[B, S, D]`.
    """
    mesh = _mesh_in_use()
    if mesh is None or x.shape[0] % _ways(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def by_columns(table: Array) -> Array:
    """Returns a table, `[V, D]`, whose columns `fsdp` divides, to look up rows in.

    Each device then looks up its columns of all tokens, and `looked_up` sends these to
    where the tokens are. To gather the table would send more, unless it is small.
    """
    mesh = _mesh_in_use()
    if mesh is None or table.shape[1] % mesh.shape["fsdp"]:
        return table
    rows = _tensor_rows(table, mesh)
    return jax.lax.with_sharding_constraint(table, PartitionSpec(rows, "fsdp"))


def looked_up(x: Array) -> Array:
    """Returns rows of a table that is divided `by_columns`, `[B, S, D]`, as `spread`.

    They are sent once from columns to sequences.
    """
    mesh = _mesh_in_use()
    if mesh is None or x.shape[0] % _ways(mesh):
        return x
    if x.shape[2] % mesh.shape["fsdp"] == 0:
        columns = PartitionSpec("data", None, "fsdp")
        x = jax.lax.with_sharding_constraint(x, columns)
    return spread(x)


def gathered(table: Array) -> Array:
    """Returns a table, `[V, D]`, that `fsdp` does not divide, to multiply by."""
    mesh = _mesh_in_use()
    if mesh is None:
        return table
    rows = PartitionSpec(_tensor_rows(table, mesh))
    return jax.lax.with_sharding_constraint(table, rows)


def _mesh_in_use() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == MESH_AXES else None


def _tensor_rows(table: Array, mesh: AbstractMesh) -> str | None:
    return None if table.shape[0] % mesh.shape["tensor"] else "tensor"


def _ways(mesh: Mesh | AbstractMesh) -> int:
    """Returns over how many parts the sequences of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
