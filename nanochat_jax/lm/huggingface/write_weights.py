"""Parameters as tensors, in one safetensors file or in parts with an index."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from nanochat_jax.config import ModelConfig
from nanochat_jax.lm.huggingface import json_files, names
from nanochat_jax.lm.huggingface.tensor_files import INDEX, WEIGHTS
from nanochat_jax.lm.model import Params

Entry = tuple[str, int, Callable[[], np.ndarray]]
"""Name of a tensor, its bytes, and a function that makes it."""


def write_weights(
    folder: Path,
    config: ModelConfig,
    params: Params,
    dtype: np.dtype,
    max_part_bytes: int,
) -> None:
    """Writes the tensors of a model; memory holds those of one part.

    Args:
      folder: Folder to write to.
      config: Settings of the model.
      params: Its parameters, as `config` has them.
      dtype: Type of the tensors.
      max_part_bytes: Most bytes of a part, unless one tensor takes more.
    """
    parts = _parts(_entries(config, params, dtype), max_part_bytes)
    places, total = {}, 0
    for i, part in enumerate(parts, 1):
        file = WEIGHTS
        if len(parts) > 1:
            file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: make() for name, _, make in part}
        # transformers asks for the framework that wrote the file, and knows this one.
        safetensors.numpy.save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(size for _, size, _ in part)
    if len(parts) > 1:
        json_files.write_object(
            folder / INDEX,
            {"metadata": {"total_size": total}, "weight_map": places},
        )


def _parts(entries: Iterator[Entry], most: int) -> list[list[Entry]]:
    """Returns the tensors in parts of at most so many bytes, in their order."""
    parts: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if parts[-1] and size + entry[1] > most:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += entry[1]
    return parts


def _entries(config: ModelConfig, params: Params, dtype: np.dtype) -> Iterator[Entry]:
    leaves = jax.tree.leaves(params)
    for place, leaf in zip(names.places(config), leaves, strict=True):
        size = int(np.prod(place.tensor_shape)) * dtype.itemsize
        for i, name in enumerate(place.tensors):
            x = (leaf, i) if place.is_stacked else (leaf, None)
            yield name, size, lambda x=x, place=place: _made(*x, place, dtype)
    if config.qk_norm == "unit":
        ones = lambda: np.ones(config.head_size, dtype)
        for i in range(config.n_layers):
            for path in names.HEAD_NORMS:
                yield names.in_block(i, path), config.head_size * dtype.itemsize, ones


def _made(leaf: Any, i: int | None, place: names.Place, dtype: np.dtype) -> np.ndarray:
    """Returns a tensor: a parameter of one block, turned, without padding."""
    x = np.asarray(leaf if i is None else leaf[i])
    x = x.T if place.is_kernel else x
    x = x[tuple(slice(size) for size in place.tensor_shape)]
    # The file takes the memory as it lies, whatever the strides.
    return np.asarray(x, dtype, order="C")
