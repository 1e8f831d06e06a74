"""Notes on the optimizers of a partition, for reports that ask at `init`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanochat_jax.config import OptimizerConfig
from nanochat_jax.optimizer.roles import Role
from nanochat_jax.optimizer.rule import Rule, in_group
from nanochat_jax.optimizer.storage import fallback_codecs, state_codecs
from nanochat_jax.transforms import record


class Note(NamedTuple):
    """What the optimizer of a parameter is asked to do.

    Attributes:
      name: Its name.
      part: Key of its state.
      rate: Learning rate, a number or a schedule; `None` without one.
      codecs: Names of the codecs of its state, by field.
    """

    name: str
    part: str
    rate: Any
    codecs: Mapping[str, str]

    @property
    def rate_in_words(self) -> str:
        """The learning rate as text, empty without one."""
        if self.rate is None:
            return ""
        try:
            with jax.ensure_compile_time_eval():
                if callable(self.rate):
                    return f"schedule, {float(jnp.asarray(self.rate(0))):.3g} at first"
                return f"{float(self.rate):.3g}"
        except jax.errors.ConcretizationTypeError:
            return "traced"


def part_of(config: OptimizerConfig, role: Role) -> str:
    """Returns the key of the state of a parameter's optimizer.

    Args:
      config: Settings of the optimizer.
      role: Role of the parameter.
    """
    wanted = role.group.optimizer if role.group else None
    return role.label if wanted in (None, "muon", config.fallback) else wanted


def note_of(config: OptimizerConfig, rule: Rule, role: Role) -> Note:
    """Returns a note on the optimizer of a parameter.

    Args:
      config: Settings of the optimizer, except for the numbers in `rule`.
      rule: Rates, decays and betas.
      role: Role of the parameter.
    """
    if role.label == "frozen":
        return Note("none", "", None, {})
    part = part_of(config, role)
    config, rule = in_group(config, rule, role.group)
    if role.label == "matrix":
        rank = f", GaLore rank {config.rank}" if config.use_galore else ""
        return Note(f"Muon{rank}", part, rule.rate, _names(state_codecs(config)))
    name = {"adamw": "AdamW", "lion": "Lion"}[config.fallback]
    plain = part in ("embedding", "head") and not config.quantize_embeddings
    codecs = {} if plain else _names(fallback_codecs(config))
    return Note(name, part, rule.fallback_rate, codecs)


def notes_by_label(told: record.Record) -> dict[str, Note]:
    """Returns the notes that were told at `init`, by label of the parameters.

    Args:
      told: What transforms told.
    """
    return {
        role.label: told.optimizers[path]
        for path, role in told.roles.items()
        if told.optimizers.get(path) is not None
    }


def _names(codecs: Mapping[str, Any]) -> dict[str, str]:
    return {field: type(codec).__name__ for field, codec in codecs.items()}
