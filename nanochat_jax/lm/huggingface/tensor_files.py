"""The tensors of a folder: one safetensors file, or parts with an index.

Files are opened and checked before any tensor is read, and all faults are told at once.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from nanochat_jax.config import schema
from nanochat_jax.lm.huggingface import json_files

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Names of the only file, and of the list of parts."""

DTYPES = ("F32", "BF16", "F16")
"""Types of tensors that are read."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor on disk.

    Attributes:
      file: Opened file that has it.
      name: Its name.
      shape: Its shape.
      dtype: Its type, as safetensors names it.
    """

    file: Any
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        """Returns the tensor, on the host."""
        return self.file.get_tensor(self.name)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Returns some of its rows.

        Args:
          start: First row.
          stop: Row after the last, or beyond the end.
        """
        return self.file.get_slice(self.name)[start : min(stop, self.shape[0])]


def open_tensors(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Opens the tensors of a folder.

    Args:
      folder: Folder of a model.

    Returns:
      The tensors by name, and a line for each fault of the files.

    Raises:
      ValueError: If the folder has no weights, or its index is not one.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        schema.require(((folder / WEIGHTS).is_file(), _no_weights(folder)))
        return _open([folder / WEIGHTS])
    places = json_files.read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: has no `weight_map`, the files of the tensors.")
    tensors, errors = _open([folder / str(x) for x in sorted({*places.values()})])
    absent = [name for name in places if name not in tensors]
    if absent and not errors:
        errors.append(
            f"{index}: names tensors that the parts do not have: {listed(absent)}."
        )
    return tensors, errors


def listed(names: Iterable[str], most: int = 5) -> str:
    """Returns the first names, and how many there are besides.

    Args:
      names: Names to list.
      most: Names that are written out.
    """
    names = list(names)
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _open(paths: list[Path]) -> tuple[dict[str, Tensor], list[str]]:
    tensors: dict[str, Tensor] = {}
    errors = []
    for path in paths:
        try:
            file: Any = safetensors.safe_open(path, framework="numpy")
        except FileNotFoundError:
            errors.append(f"{path}: no such file, but {INDEX} names it.")
        except (OSError, safetensors.SafetensorError) as error:
            errors.append(f"{path}: damaged or cut off: {error}.")
        else:
            found = {name: _tensor(file, name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            twice = [name for name in found if name in tensors]
            if twice:
                errors.append(f"{path}: has tensors of another part: {listed(twice)}.")
            tensors |= found
    return tensors, errors


def _tensor(file: Any, name: str) -> Tensor:
    header = file.get_slice(name)
    return Tensor(file, name, tuple(header.get_shape()), header.get_dtype())


def _no_weights(folder: Path) -> str:
    pickled = sorted(
        x.name for kind in ("*.bin", "*.pt", "*.pth") for x in folder.glob(kind)
    )
    if pickled:
        return (
            f"{folder}: its weights are pickled ({listed(pickled)}), which may run any "
            "code when read. Save them as safetensors: `save_pretrained` of "
            "transformers does."
        )
    return f"{folder}: no weights: neither {WEIGHTS} nor {INDEX} is there."
