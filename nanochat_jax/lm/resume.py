"""What a resumed run may change, and how a state moves to another storage."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.tree_util import keystr
from jaxtyping import Array, Int32

from nanochat_jax.lm import records
from nanochat_jax.lm.setup import Run
from nanochat_jax.optimizer import build_optimizer
from nanochat_jax.transforms import dequantize, quantize

# Settings under which a resumed run may differ and still be the same run.
RESUMABLE = (
    "checkpoint_interval",
    "data_path",  # the ids themselves must agree
    "eval_batches",
    "eval_interval",
    "keep_last_checkpoints",
    "log_interval",
    "sample_prompt",
    "sample_tokens",
    "tokenizer",
)

# Settings that say how the optimizer's state is stored, not what it is.
STORAGE = (
    "projector_bits",
    "quant_bits",
    "quant_block_size",
    "quant_codec",
    "quant_min_size",
    "quant_scale_dtype",
    "quantize_embeddings",
    "stochastic_rounding",
    "use_8bit_optim",
)


def stored_run(run: Run, meta: Mapping[str, Any], allow_codec_change: bool) -> Run:
    """Returns the run that a checkpoint is of, if `run` may go on from it.

    Args:
      run: The run to resume.
      meta: What the checkpoint records.
      allow_codec_change: Whether its state may be stored otherwise.

    Returns:
      `run` itself, or with the settings and the optimizer it was stored with.

    Raises:
      ValueError: If other settings or the data differ.
    """
    storage = _keys(STORAGE)
    records.check_meta(
        meta,
        run.meta,
        ignore=[*_keys(RESUMABLE), *(storage if allow_codec_change else ())],
        flags={"--allow-codec-change": storage},
    )
    stored = meta["config"]
    changed = {
        key: stored[key]
        for key in STORAGE
        if key in stored and stored[key] != getattr(run.config, key)
    }
    if not changed:
        return run
    config = dataclasses.replace(run.config, **changed)
    tx = build_optimizer(config, run.params)
    return dataclasses.replace(run, config=config, tx=tx)


def describe_change(old: Run, new: Run) -> str:
    """Returns in words which settings of the storage changed."""
    pairs = (
        (key, getattr(old.config, key), getattr(new.config, key)) for key in STORAGE
    )
    changed = [f"{key} {was} -> {now}" for key, was, now in pairs if was != now]
    return f"state decoded and stored anew: {', '.join(changed)}"


def convert_state(
    old: Run, new: Run, state: optax.OptState, step: Int32[Array, ""]
) -> optax.OptState:
    """Returns the optimizer state of one run as another stores it.

    Args:
      old: The run that the state is of.
      new: The same run, but for the settings in `STORAGE`.
      state: State of `old.tx`.
      step: Steps taken.

    Returns:
      The state of `new.tx`.

    Raises:
      ValueError: If the storage decides which matrices are projected, and it is not the
        same ones.
    """
    plain, wanted = _plain_shapes(old), _plain_shapes(new)
    _require_same_shapes(plain, wanted)

    @jax.jit
    def convert(state: optax.OptState, step: Int32[Array, ""]) -> optax.OptState:
        plain = optax.tree.cast_like(dequantize(old.tx, state, old.params), wanted)
        return quantize(new.tx, plain, new.params, step)

    return convert(state, step)


def _keys(names: tuple[str, ...]) -> list[str]:
    return [f"config.{name}" for name in names]


def _plain_shapes(run: Run) -> Any:
    state = jax.eval_shape(run.tx.init, run.params)
    return jax.eval_shape(lambda state: dequantize(run.tx, state, run.params), state)


def _require_same_shapes(stored: Any, wanted: Any) -> None:
    shapes = lambda tree: {
        keystr(path): str(x.shape) for path, x in jax.tree.leaves_with_path(tree)
    }
    changed = records.changes(shapes(stored), shapes(wanted))
    if changed:
        raise ValueError(
            "Matrices are projected where that saves bytes, and the new storage saves "
            "them for other ones, so the state cannot be taken over.\n"
            f"{records.listed(records.differences(changed, 'wanted'))}\n"
            "Set `projector_bits` and `quant_bits` as they were."
        )
