"""Resumption: settings that may change, and states in another storage."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr
from jaxtyping import Array, Int32

from nanochat_jax.config import Config, schema
from nanochat_jax.lm.checkpoints import Checkpoints, differences, record
from nanochat_jax.lm.model import build_optimizer
from nanochat_jax.lm.training.run import Run
from nanochat_jax.lm.training.step import TrainState, abstract_state, state_shardings
from nanochat_jax.optimizer import schedule
from nanochat_jax.transforms import dequantize, quantize

RESUMABLE = (*schema.affecting(Config, "course", "nothing"), "total_steps")
"""Settings that may change when a run is resumed; `total_steps` moves the schedule."""

STORAGE = schema.affecting(Config, "storage")
"""Settings of how the optimizer's state is stored, not of which numbers it holds."""

Change = Literal["codec", "data", "tokenizer"]
"""Differences that `--allow-...-change` permits."""

CHANGES: dict[Change, list[str]] = {
    "codec": [f"config.{name}" for name in STORAGE],
    "data": ["data", "config.dataset", "config.token_dtype"],
    "tokenizer": ["tokenizer"],
}


@dataclasses.dataclass(frozen=True)
class Resumption:
    """A checkpoint that a run may go on from; its state is not read yet.

    Attributes:
      run: The run to resume.
      old: The run as it was stored: `run`, or with other storage of the state.
      checkpoints: Where its states are.
      meta: Record of the checkpoint.
    """

    run: Run
    old: Run
    checkpoints: Checkpoints
    meta: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Steps done."""
        return self.checkpoints.latest_step() or 0

    def restore(self, say: Callable[[str], object] = print) -> TrainState:
        """Returns the state, bit for bit as it was saved if it is stored as it was.

        Args:
          say: Function called with a line about each difference, and about versions.

        Raises:
          ValueError: If it is damaged, or cannot be stored as the run wants it.
        """
        names = record.stored_names(self.meta)
        state = self.checkpoints.restore(abstract_state(self.old), names=names)
        lines = _describe_changes(self.meta, self.run)
        # The optimizer does not count steps that were skipped.
        taken = int(state.step) - int(state.guard.skipped)
        lines += _describe_schedule(self.meta, self.run.config, taken)
        if self.old is not self.run:
            changed = convert_state(self.old, self.run, state.opt_state, state.step)
            state = state._replace(opt_state=changed)
            lines.append(describe_change(self.old, self.run))
        for line in lines:
            say(f"{self.checkpoints.directory}: {line}.")
        return state


def check(
    run: Run, checkpoints: Checkpoints, *, allow: Collection[Change] = ()
) -> Resumption:
    """Finds the latest state of a run, and refuses one of another run.

    The learning rate is a function of the step and of `total_steps`: with another
    number of steps it is, from the next step on, that of a run which had this number
    from its start.

    Args:
      run: The run to resume.
      checkpoints: Where its states are.
      allow: Permitted differences: "codec", storage of the optimizer's state, which is
        then decoded and encoded anew; "data", training data from here on; "tokenizer",
        whose ids must have the same meaning.

    Returns:
      The checkpoint to go on from.

    Raises:
      ValueError: If there is none, it has weights alone, or it was saved with other
        settings or data.
    """
    meta, where = checkpoints.read_meta(), str(checkpoints.directory)
    record.require_state(meta, where)
    meta["config"] = record.settings_in(meta, where)
    if run.corpus.tokenizer is None and meta["tokenizer"] == "bytes":
        meta["tokenizer"] = None  # as earlier versions recorded an unknown one
    return Resumption(run, stored_run(run, meta, allow), checkpoints, meta)


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
      allow: Permitted differences, as for `check`.
      say: As for `Resumption.restore`.

    Returns:
      The state.

    Raises:
      ValueError: As `check` and `Resumption.restore`.
    """
    return check(run, checkpoints, allow=allow).restore(say)


def stored_run(run: Run, meta: Mapping[str, Any], allow: Collection[Change]) -> Run:
    """Returns the run that a checkpoint is of, if `run` may go on from it.

    Args:
      run: The run to resume.
      meta: Record of the checkpoint.
      allow: Permitted differences.

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

    where = state_shardings(new)

    @functools.partial(jax.jit, out_shardings=where and where.opt_state)
    def convert(state: optax.OptState, step: Int32[Array, ""]) -> optax.OptState:
        plain = optax.tree.cast_like(dequantize(state), wanted)
        like = jax.eval_shape(new.tx.init, new.params)
        return quantize(like, plain, step, new.config.seed)

    return convert(state, step)


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


def _describe_schedule(meta: Mapping[str, Any], new: Config, taken: int) -> list[str]:
    """Returns a line about the learning rate, if the number of steps changed."""
    total = meta["config"]["total_steps"]
    if total == new.total_steps:
        return []
    old = dataclasses.replace(new, total_steps=total)
    was, now = (
        float(jnp.asarray(schedule(each, each.lr)(taken))) for each in (old, new)
    )
    falls = "falls already"
    if taken < (new.decay_start or 0):
        falls = f"falls from step {new.decay_start} on"
    return [
        f"`total_steps` {total} -> {new.total_steps}: from here on the learning rate "
        f"is that of `{new.schedule}` over {new.total_steps} steps. It goes on at "
        f"{now:.3g}, in place of {was:.3g}, and {falls}"
    ]


def _plain_shapes(run: Run) -> Any:
    return jax.eval_shape(dequantize, jax.eval_shape(run.tx.init, run.params))


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
