"""Parameters from the tensors of a folder, read one by one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath, tree_structure, tree_unflatten

from nanochat_jax.config import ModelConfig, schema
from nanochat_jax.lm.huggingface import names, tensor_files
from nanochat_jax.lm.huggingface.names import Place
from nanochat_jax.lm.huggingface.tensor_files import Tensor, listed
from nanochat_jax.lm.model import Params, gpt

Put = Callable[[KeyPath, np.ndarray], Any]
"""Function from the path of a parameter and its values to the array that is kept."""

# Rows of the embedding compared with a head at a time.
_ROWS = 4096


def _to_device(path: KeyPath, x: np.ndarray) -> Any:
    del path
    return jnp.asarray(x)


def read_weights(
    folder: str | Path, config: ModelConfig, put: Put = _to_device
) -> Params:
    """Reads the parameters of a model.

    Each is read, turned to `[in, out]`, cast, and handed to `put` before the next one,
    so that the host holds one model and one parameter at most. bfloat16 and float16 in
    float32 are exact; float32 in bfloat16 is rounded to the nearest.

    Example:
      >>> from nanochat_jax.lm import huggingface
      >>> from nanochat_jax.lm.model import gpt
      >>> config = ModelConfig(dim=16, n_layers=1, n_heads=2, qk_norm="gain")
      >>> params = gpt.init(config, 0)[1]
      >>> huggingface.write_folder("mine", config, params, tokenizer=None)
      >>> read_weights("mine", config)["embed"]["embedding"].shape
      (256, 16)

    Args:
      folder: Folder with `model.safetensors`, or with parts of it and their index.
      config: Settings of the model, from `read_config`; `param_dtype`, `scan_layers`
        and `pad_vocab_to` may be others. The padding is zeros.
      put: Function from the path of a parameter and its values, which are contiguous,
        to the array that is kept.

    Returns:
      The parameters, as `config` has them.

    Raises:
      ValueError: If there are no weights, a file is missing or damaged, or the tensors
        do not have the names, shapes and types of the settings. All are listed, and
        nothing large was read.
    """
    folder = Path(folder)
    places = names.places(config)
    tensors, errors = tensor_files.open_tensors(folder)
    faults = _faults(config, places, tensors) if not errors else []
    schema.require(
        *((False, line) for line in errors),
        *((False, f"{folder}: {line}") for line in faults),
    )
    dtype = jnp.dtype(config.param_dtype)
    leaves = [put(place.path, _read(place, tensors, dtype)) for place in places]
    return tree_unflatten(tree_structure(gpt.abstract_model(config)[1]), leaves)


def _read(place: Place, tensors: Mapping[str, Tensor], dtype: np.dtype) -> np.ndarray:
    """Returns a parameter, contiguous, with zeros for the padding."""
    if len(place.tensors) == 1 and not place.is_stacked:
        x = _turned(place, tensors[place.tensors[0]].read())
        if x.shape == place.shape:
            return np.asarray(x, dtype, order="C")
        padded = np.zeros(place.shape, dtype)
        padded[tuple(slice(size) for size in x.shape)] = x
        return padded
    stacked = np.empty(place.shape, dtype)
    for i, name in enumerate(place.tensors):
        stacked[i] = _turned(place, tensors[name].read())
    return stacked


def _turned(place: Place, x: np.ndarray) -> np.ndarray:
    return x.T if place.is_kernel else x


def _faults(
    config: ModelConfig, places: list[Place], tensors: Mapping[str, Tensor]
) -> list[str]:
    """Returns a line for each way in which tensors are not those of the settings."""
    wanted = {name: x.tensor_shape for x in places for name in x.tensors}
    missing = [name for name in wanted if name not in tensors]
    others = [
        name
        for name in tensors
        if name not in wanted and not _is_spare(config, name, tensors)
    ]
    errors = []
    if missing:
        errors.append(f"tensors are missing: {listed(missing)}.")
    if others:
        errors.append(
            f"tensors that the model of config.json does not have: {listed(others)}."
        )
    for name, shape in wanted.items():
        found = tensors.get(name)
        if found is not None and found.shape != shape:
            errors.append(f"{name}: must be {list(shape)}, got {list(found.shape)}.")
        if found is not None and found.dtype not in tensor_files.DTYPES:
            known = ", ".join(tensor_files.DTYPES)
            errors.append(f"{name}: must be {known}, got {found.dtype}.")
    return errors


def _is_spare(config: ModelConfig, name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether a tensor has nothing that is not known without it."""
    if name.endswith("rotary_emb.inv_freq"):  # the frequencies, in early files
        return True
    embedding = tensors.get(names.EMBEDDING)
    if embedding is None or name != names.HEAD or not config.weight_tied:
        return False
    return _equal(tensors[name], embedding)


def _equal(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    starts = range(0, a.shape[0], _ROWS)
    return all(
        np.array_equal(a.rows(i, i + _ROWS), b.rows(i, i + _ROWS)) for i in starts
    )
