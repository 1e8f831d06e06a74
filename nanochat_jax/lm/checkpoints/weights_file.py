"""Weights for other tools: safetensors, and a JSON file beside them.

`F.safetensors` has each parameter under its path, `blocks.0.attention.query.kernel`;
kernels are `[in, out]`, and blocks are apart also where training had them stacked. The
vocabulary has no padding.
`F.json` has `config`, the fields of `ModelConfig`, the fingerprint of the `tokenizer`,
the `step`, `versions`, and the `sha256` of the weights. Its `kernels` are `"latent"` if
the model rounds those of its blocks before use, by `ternary.ternarize`, else `"plain"`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.tree_util import keystr

from nanochat_jax.config import ModelConfig, schema
from nanochat_jax.lm.checkpoints import checksums, differences
from nanochat_jax.lm.model import Params, gpt, unstack_layers
from nanochat_jax.lm.runtime import atomic_files, machine


def save(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    step: int,
    tokenizer: str | None,
) -> None:
    """Writes the weights of a model, and its JSON file.

    Each file is written whole; the JSON file, which is last, has the checksum of the
    weights, so that files of two models are not taken for one.

    Args:
      path: File to write, `F.safetensors`; its folder is made.
      config: Settings of the model.
      params: Its parameters, as `config` has them.
      step: Steps it was trained for.
      tokenizer: Fingerprint of its tokenizer, if known.

    Raises:
      ValueError: If the name of the file does not end in `.safetensors`.
    """
    path = check_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    params = gpt.without_padding(config, params)
    if config.scan_layers:
        params = unstack_layers(params)
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    settings_used = {name: getattr(config, name) for name in fields}
    record = {
        "config": {**settings_used, "scan_layers": False, "pad_vocab_to": 1},
        "kernels": "latent" if config.ternary else "plain",
        "tokenizer": tokenizer,
        "step": step,
        "versions": machine.versions(),
    }
    # In a fixed order, so that equal weights make equal files.
    # The file takes their memory as it lies, whatever the strides.
    weights = {
        name: np.asarray(x, order="C") for name, x in sorted(_named(params).items())
    }
    with atomic_files.replacing(path) as temporary:
        safetensors.numpy.save_file(weights, temporary, {"format": "flax"})
        record["sha256"] = checksums.digest(temporary)
    with atomic_files.replacing(config_path(path)) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load(path: str | Path) -> tuple[ModelConfig, Params]:
    """Reads settings and weights that `save` wrote.

    Args:
      path: File of the weights; its JSON file must lie beside it.

    Returns:
      The settings of the model, without `scan_layers` and `pad_vocab_to`, and its
      parameters on the default device.

    Raises:
      ValueError: If a file is missing or damaged, they are not of one model, or the
        weights do not have the names, shapes and types of the settings.
    """
    path = check_path(path)
    record = read_record(path)
    config = schema.build(ModelConfig, record["config"], str(config_path(path)))
    weights = safetensors.numpy.load_file(path)
    params = gpt.abstract_model(config)[1]
    changed = differences.changes(
        differences.layout(weights), differences.layout(_named(params))
    )
    schema.require(
        (
            not changed,
            f"{path}: not the weights of the model in {config_path(path)}.\n"
            f"{differences.listed(differences.differences(changed, 'wanted'))}",
        )
    )
    leaves = [jnp.asarray(weights[name]) for name in _named(params)]
    return config, jax.tree.unflatten(jax.tree.structure(params), leaves)


def check_path(path: str | Path) -> Path:
    """Returns `path`, if it names a file of weights.

    Raises:
      ValueError: If it does not end in `.safetensors`.
    """
    path = Path(path)
    schema.require(
        (
            path.suffix == ".safetensors",
            f"the file of weights must end in .safetensors, got {path}.",
        )
    )
    return path


def config_path(path: str | Path) -> Path:
    """Returns the JSON file that belongs to a file of weights."""
    return Path(path).with_suffix(".json")


def _named(params: Params) -> dict[str, Any]:
    """Returns the parameters by their paths with dots, in the order of the tree."""
    leaves = jax.tree.leaves_with_path(params)
    return {keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def read_record(path: Path) -> dict[str, Any]:
    """Returns the JSON object beside a file of weights, if it is of that file.

    Args:
      path: File of the weights.

    Raises:
      ValueError: If a file is missing or damaged, or they are not of one model.
    """
    beside = config_path(path)
    missing = [str(file) for file in (path, beside) if not file.is_file()]
    schema.require((not missing, f"no such file: {', '.join(missing)}."))
    try:
        record = json.loads(beside.read_text(encoding="utf-8"))
        stored = record["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{beside}: not written by `export`: {error!r}.") from None
    schema.require(
        (
            stored == checksums.digest(path),
            f"{path}: not the weights that {beside} was written with: their checksums "
            "differ. Export both again.",
        )
    )
    return record
