"""What a resumed run may change, and how a state moves to another storage."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import jax
import optax
from jax.tree_util import keystr
from jaxtyping import Array, Int32

from nanochat_jax.config import Config
from nanochat_jax.lm.checkpoints import Checkpoints, differences
from nanochat_jax.lm.model import build_optimizer
from nanochat_jax.lm.training.run import FORMAT, Run
from nanochat_jax.lm.training.step import TrainState, abstract_state, state_places
from nanochat_jax.transforms import dequantize, quantize

# Settings under which a resumed run may differ and still be the same run.
RESUMABLE = (
    "checkpoint_interval",
    "data_path",  # the ids themselves must agree
    "eval_batches",
    "eval_interval",
    "keep_checkpoint_every",
    "keep_last_checkpoints",
    "log_interval",
    "max_skipped_steps",
    "measure_optimizer",
    "mesh",
    "sample_interval",
    "sample_prompt",
    "sample_tokens",
    "spike_skip",
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

Change = Literal["codec", "data", "tokenizer"]
"""What may differ if that is asked for, by `--allow-...-change`."""

CHANGES: dict[Change, list[str]] = {
    "codec": [f"config.{name}" for name in STORAGE],
    "data": ["data", "config.dataset", "config.token_dtype"],
    "tokenizer": ["tokenizer"],
}


def restore(
    run: Run,
    checkpoints: Checkpoints,
    *,
    allow: Collection[Change] = (),
    say: Callable[[str], object] = print,
) -> TrainState:
    """Restores the latest state, if it is one of this run.

    Args:
      run: The run to resume.
      checkpoints: Where its states are.
      allow: What may differ: "codec", how the optimizer's state is stored, which is
        then decoded and stored anew; "data", what is trained on from here; "tokenizer",
        whose ids must then mean what they meant.
      say: What is given a line for each of these that does differ, and for versions.

    Returns:
      The state, bit for bit as it was saved if it is stored as it was.

    Raises:
      ValueError: If there is none, or it was saved with other settings or data.
    """
    meta = checkpoints.read_meta()
    _check_format(meta, checkpoints)
    meta["config"] = dataclasses.asdict(Config()) | meta["config"]
    old = stored_run(run, meta, allow)
    state = checkpoints.restore(abstract_state(old))
    lines = _describe_changes(meta, run)
    if old is not run:
        opt_state = convert_state(old, run, state.opt_state, state.step)
        state = state._replace(opt_state=opt_state)
        lines.append(describe_change(old, run))
    for line in lines:
        say(f"{checkpoints.directory}: {line}.")
    return state


def stored_run(run: Run, meta: Mapping[str, Any], allow: Collection[Change]) -> Run:
    """Returns the run that a checkpoint is of, if `run` may go on from it.

    Args:
      run: The run to resume.
      meta: What the checkpoint records.
      allow: What may differ.

    Returns:
      `run` itself, or with the settings and the optimizer it was stored with.

    Raises:
      ValueError: If anything else differs.
    """
    allowed = [key for name in allow for key in CHANGES[name]]
    parts = ("config", "data", "tokenizer")
    differences.check_meta(
        {part: meta[part] for part in parts},
        {part: run.meta[part] for part in parts},
        ignore=[*(f"config.{name}" for name in RESUMABLE), *allowed],
        flags={f"--allow-{name}-change": keys for name, keys in CHANGES.items()},
    )
    stored = meta["config"]
    changed = {
        key: stored[key] for key in STORAGE if stored[key] != getattr(run.config, key)
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

    where = state_places(new)

    @functools.partial(jax.jit, out_shardings=where and where.opt_state)
    def convert(state: optax.OptState, step: Int32[Array, ""]) -> optax.OptState:
        plain = optax.tree.cast_like(dequantize(old.tx, state, old.params), wanted)
        return quantize(new.tx, plain, new.params, step)

    return convert(state, step)


def _check_format(meta: Mapping[str, Any], checkpoints: Checkpoints) -> None:
    """Refuses a checkpoint of another layout."""
    if meta.get("format") == FORMAT:
        return
    found = meta.get("format", "none")
    writer = meta.get("versions", {}).get("nanochat-jax", "an earlier version")
    raise ValueError(
        f"{checkpoints.directory}: the checkpoint has format {found}, and this version "
        f"reads format {FORMAT}. Resume it with nanochat-jax {writer}, or train from "
        "the start in a new directory."
    )


def _describe_changes(meta: Mapping[str, Any], run: Run) -> list[str]:
    """Returns a line about other data, another tokenizer, and other versions."""
    changed = differences.changes(differences.flat(meta), differences.flat(run.meta))
    differ = lambda keys: [
        f"{key} {' -> '.join(changed[key])}" for key in sorted(changed) if key in keys
    ]
    told = {
        "trained from here on other data": CHANGES["data"],
        "ids are taken to mean what they did, under another tokenizer": [
            *CHANGES["tokenizer"]
        ],
        "written by other versions, so last bits may differ": [
            key for key in changed if key.startswith("versions.")
        ],
    }
    return [
        f"{text}: {', '.join(differ(keys))}"
        for text, keys in told.items()
        if differ(keys)
    ]


def _plain_shapes(run: Run) -> Any:
    state = jax.eval_shape(run.tx.init, run.params)
    return jax.eval_shape(lambda state: dequantize(run.tx, state, run.params), state)


def _require_same_shapes(stored: Any, wanted: Any) -> None:
    shapes = lambda tree: {
        keystr(path): str(x.shape) for path, x in jax.tree.leaves_with_path(tree)
    }
    changed = differences.changes(shapes(stored), shapes(wanted))
    if changed:
        raise ValueError(
            "Matrices are projected where that saves bytes, and the new storage saves "
            "them for other ones, so the state cannot be taken over.\n"
            f"{differences.listed(differences.differences(changed, 'wanted'))}\n"
            "Set `projector_bits` and `quant_bits` as they were."
        )
