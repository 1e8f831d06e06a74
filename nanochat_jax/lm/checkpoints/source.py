"""Models to start from: checkpoints, exported weights, Hugging Face folders.

Weights are read one array at a time, each put in its place before the next, so that the
host holds no second copy of the model. They may be stored stacked or apart, padded or
not, in another type: `read` gives them as the settings of the new run want them.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import tokenizers
from jax.tree_util import keystr

from nanochat_jax.config import ModelConfig, schema
from nanochat_jax.lm import huggingface
from nanochat_jax.lm.checkpoints import checksums, differences, record, weights_file
from nanochat_jax.lm.checkpoints.assemble import assembled, paths_of, put_as
from nanochat_jax.lm.checkpoints.store import Checkpoints
from nanochat_jax.lm.model import Params, gpt

TOKENIZER_FILE = "tokenizer.json"
"""Name of a tokenizer that lies beside the weights."""

MAY_DIFFER = (
    "compute_dtype",
    "loss_chunk",
    "max_seq_len",
    "pad_vocab_to",
    "param_dtype",
    "remat",
    "scan_layers",
)
"""Settings of the model that a run may choose; `max_seq_len` up to the stored one."""

_DERIVED = {"n_kv_heads": "kv_heads", "ffn_mult": "ffn_dim", "head_dim": "head_size"}


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to start from; its weights are not read yet.

    Attributes:
      path: Folder or file of it.
      kind: Its kind, in words.
      config: Settings of the model, as it is stored.
      step: Steps it was trained for.
      tokenizer_file: File of its tokenizer, if it has one.
      end_token: Token that ends a document, if it was set.
      fingerprint: Fingerprint of its tokenizer; `None` if that is not known.
      read: Function from settings and shapes to parameters, see `read_source`.
    """

    path: str
    kind: str
    config: ModelConfig
    step: int
    tokenizer_file: str | None
    end_token: str | None
    fingerprint: str | None
    read: Callable[[ModelConfig, Params], Params]

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of a run that follow from the model, where none are given."""
        fields = {x.name: getattr(self.config, x.name) for x in _fields()}
        file, end = self.tokenizer_file, self.end_token
        return {**fields, "tokenizer": file, "end_token": end}

    def check(self, config: ModelConfig) -> None:
        """Refuses settings that are not those of the model.

        Args:
          config: Settings of a run.

        Raises:
          ValueError: If a setting differs that may not; all are listed.
        """
        changed = _changed(self.config, config)
        lines = differences.differences(changed, "wanted")
        schema.require(
            (
                not changed,
                f"{self.path}: the model to start from has other settings.\n"
                f"{differences.listed(lines, most=len(lines))}\n"
                "Leave them out: they come from the model. Others may be chosen: "
                f"{', '.join(MAY_DIFFER)}, the length up to the stored one.",
            )
        )


def open_source(path: str | Path) -> Source:
    """Finds a model to start from, by its path.

    Args:
      path: A Hugging Face folder, which has a `config.json`; a checkpoint folder, or
        the folder of one step; or a file of weights that `export` wrote.

    Returns:
      The model; its weights are not read yet.

    Raises:
      ValueError: If no model is there, or one that is not read here.
    """
    path = Path(path).expanduser()
    if path.suffix == ".safetensors":
        return _exported(path)
    if (path / "config.json").is_file():
        return _hugging_face(path)
    checkpoints = Checkpoints(path)
    if checkpoints.latest_step() is not None:
        return _checkpoint(checkpoints)
    raise ValueError(
        f"{path}: no model is there. Give a Hugging Face folder, which has a "
        "`config.json`; a checkpoint folder of a run or of `import`; or a file of "
        "weights that `export` wrote, F.safetensors."
    )


def tokenizer_beside(folder: Path) -> str | None:
    """Returns the tokenizer that lies in a folder, if there is one."""
    path = folder / TOKENIZER_FILE
    return str(path) if path.is_file() else None


def _checkpoint(checkpoints: Checkpoints) -> Source:
    step = checkpoints.latest_step()
    meta = checkpoints.read_meta(verify=False)
    path = f"{checkpoints.directory}/{step}"
    stored = record.settings_in(meta, path)
    config = schema.build(ModelConfig, stored, path, others=stored)
    paths = paths_of(gpt.abstract_model(config)[1])

    def read_leaf(name: str) -> np.ndarray:
        at, like = paths[name]
        target: Any = np.empty(like.shape, like.dtype)
        for key in reversed(at):
            target = {key.key: target}
        restored = checkpoints.restore({"params": target}, step, partial=True)
        return jax.tree.leaves(restored)[0]

    file = tokenizer_beside(checkpoints.directory) or stored["tokenizer"]
    return Source(
        path=path,
        kind="checkpoint",
        config=config,
        step=step or 0,
        tokenizer_file=file,
        end_token=stored["end_token"],
        fingerprint=meta["tokenizer"],
        read=functools.partial(assembled, config, read_leaf),
    )


def _exported(path: Path) -> Source:
    described = weights_file.read_record(path)
    source = str(weights_file.config_path(path))
    config = schema.build(ModelConfig, described["config"], source)
    file: Any = safetensors.safe_open(path, framework="numpy")
    _check_shapes(path, config, file)
    return Source(
        path=str(path),
        kind="exported weights",
        config=config,
        step=described["step"],
        tokenizer_file=tokenizer_beside(path.parent),
        end_token=None,
        fingerprint=described["tokenizer"],
        read=functools.partial(
            assembled, config, lambda name: file.get_tensor(name.replace("/", "."))
        ),
    )


def _hugging_face(folder: Path) -> Source:
    config = huggingface.read_config(folder)
    file = huggingface.tokenizer_path(folder)

    def read(wanted: ModelConfig, like: Params) -> Params:
        leaves = {keystr(path): x for path, x in jax.tree.leaves_with_path(like)}
        put = lambda path, x: put_as(leaves[keystr(path)], x)
        return huggingface.read_weights(folder, wanted, put=put)

    return Source(
        path=str(folder),
        kind="Hugging Face folder",
        config=config,
        step=0,
        tokenizer_file=file and str(file),
        end_token=_end_token(folder, file) if file else None,
        fingerprint=checksums.digest(file) if file else None,
        read=read,
    )


def _end_token(folder: Path, file: Path) -> str | None:
    """Returns the end token that a folder gives by its id alone, if it does."""
    end = huggingface.end_token(folder)
    if not isinstance(end, int):
        return None
    return tokenizers.Tokenizer.from_file(str(file)).id_to_token(end)


def _check_shapes(path: Path, config: ModelConfig, file: Any) -> None:
    """Refuses weights that do not have the names and shapes of their settings."""
    stored = {name: str(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    params = paths_of(gpt.abstract_model(config)[1]).items()
    wanted = {name.replace("/", "."): str([*x.shape]) for name, (_, x) in params}
    changed = differences.changes(stored, wanted)
    schema.require(
        (
            not changed,
            f"{path}: not the weights of the model in {weights_file.config_path(path)}."
            f"\n{differences.listed(differences.differences(changed, 'wanted'))}",
        )
    )


def _changed(stored: ModelConfig, wanted: ModelConfig) -> dict[str, tuple[str, str]]:
    """Returns the settings of a model that differ and may not, with both values."""
    changed = {}
    for name in (field.name for field in _fields()):
        used = _DERIVED.get(name, name)
        same = getattr(stored, used) == getattr(wanted, used)
        pair = (getattr(stored, name), getattr(wanted, name))
        if name not in MAY_DIFFER and pair[0] != pair[1] and not same:
            changed[name] = pair
    if wanted.max_seq_len > stored.max_seq_len:
        changed["max_seq_len"] = (stored.max_seq_len, wanted.max_seq_len)
    return {name: (repr(old), repr(new)) for name, (old, new) in changed.items()}


def _fields() -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(ModelConfig)
