"""Sharding of batches and activations over the mesh.

Axes: B sequences of a batch, S tokens of a sequence, D residual stream, V vocabulary.
"""

import contextlib
import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
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
            batch_size % _parts(mesh) == 0,
            "`batch_size` must be a multiple of `data` x `fsdp`, the axes of `mesh` "
            f"that divide its sequences, got {batch_size} and {_parts(mesh)}.",
        )
    )


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Returns the sharding of a batch `[..., B, S]`; replicated if B does not divide.

    Args:
      mesh: Mesh of the axes `MESH_AXES`.
      shape: Shape of the batch.
    """
    rows = BATCH_AXES if shape[-2] % _parts(mesh) == 0 else None
    return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 2), rows))


def own_rows(mesh: Mesh, count: int) -> np.ndarray:
    """Returns which sequences of a batch are on devices of this process, in order.

    Args:
      mesh: Mesh of the axes `MESH_AXES`.
      count: Sequences of the batch, B.
    """
    sharding = batch_sharding(mesh, (count, 1))
    indices = sharding.addressable_devices_indices_map((count, 1)).values()
    rows = [np.arange(count)[index[0]] for index in indices if index is not None]
    return np.unique(np.concatenate(rows))


def put_batch(mesh: Mesh, own: np.ndarray, count: int) -> Array:
    """Returns a batch as one array on the devices of all processes.

    Args:
      mesh: Mesh of the axes `MESH_AXES`.
      own: Sequences of this process, from `own_rows`, `[..., rows, S]`.
      count: Sequences of the batch, B.

    Returns:
      An array `[..., B, S]`.
    """
    shape = (*own.shape[:-2], count, own.shape[-1])
    return jax.make_array_from_process_local_data(
        batch_sharding(mesh, shape), own, shape
    )


@contextlib.contextmanager
def using(mesh: Mesh | None) -> Iterator[None]:
    """Sets the mesh that the functions below use, while a function is traced.

    Args:
      mesh: Mesh of the axes `MESH_AXES`, if there is one.
    """
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh):
        yield


def is_used() -> bool:
    """Returns whether a mesh is in use."""
    return _mesh_in_use() is not None


def divide_sequences(x: Array) -> Array:
    """Divides activations by sequences over the mesh in use, if any.

    Without it the compiler may gather sequences rather than parameters.

    Args:
      x: Activations, `[B, S, D]`.
    """
    mesh = _mesh_in_use()
    if mesh is None or x.shape[0] % _parts(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def divide_columns(table: Array) -> Array:
    """Divides a table by columns over `fsdp`, to look up rows in.

    Each device then looks up its columns for all tokens. To gather the table instead
    would send more, unless the table is small.

    Args:
      table: Embeddings, `[V, D]`.
    """
    mesh = _mesh_in_use()
    if mesh is None or table.shape[1] % mesh.shape["fsdp"]:
        return table
    rows = _tensor_rows(table, mesh)
    return jax.lax.with_sharding_constraint(table, PartitionSpec(rows, "fsdp"))


def columns_to_sequences(x: Array) -> Array:
    """Moves rows of a table divided by columns to the devices of their sequences.

    Args:
      x: Rows from a table of `divide_columns`, `[B, S, D]`.
    """
    mesh = _mesh_in_use()
    if mesh is None or x.shape[0] % _parts(mesh):
        return x
    if x.shape[2] % mesh.shape["fsdp"] == 0:
        columns = PartitionSpec("data", None, "fsdp")
        x = jax.lax.with_sharding_constraint(x, columns)
    return divide_sequences(x)


def gather_columns(table: Array, dtype: DTypeLike) -> Array:
    """Gathers a table over `fsdp`, to multiply by.

    Args:
      table: Embeddings, `[V, D]`.
      dtype: Type in which it is sent.
    """
    mesh = _mesh_in_use()
    if mesh is None:
        return table
    rows = PartitionSpec(_tensor_rows(table, mesh))
    return jax.lax.with_sharding_constraint(table.astype(dtype), rows)


def _mesh_in_use() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == MESH_AXES else None


def _tensor_rows(table: Array, mesh: AbstractMesh) -> str | None:
    return None if table.shape[0] % mesh.shape["tensor"] else "tensor"


def _parts(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of parts into which the sequences of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
