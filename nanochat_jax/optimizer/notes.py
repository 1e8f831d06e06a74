"""Notes on the optimizers of a partition, for reports that ask at `init`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanochat_jax.config import OptimizerConfig
from nanochat_jax.optimizer.rule import Rule
from nanochat_jax.optimizer.storage import fallback_codecs, state_codecs
from nanochat_jax.transforms import record


class Note(NamedTuple):
    """What the optimizer of a label is asked to do.

    Attributes:
      name: Its name.
      rate: Learning rate, a number or a schedule; `None` without one.
      codecs: Names of the codecs of its state, by field.
    """

    name: str
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


def notes_of(config: OptimizerConfig, rule: Rule) -> dict[str, Note]:
    """Returns notes on the optimizers of a configuration, by label.

    Args:
      config: Settings of the optimizer, except for the numbers in `rule`.
      rule: Rates, decays and betas.
    """
    name = "Muon"
    if config.use_galore:
        name += f", GaLore rank {config.rank}"
    few = _names(fallback_codecs(config))
    fallback = {"adamw": "AdamW", "lion": "Lion"}[config.fallback]
    table = Note(
        fallback, rule.fallback_rate, few if config.quantize_embeddings else {}
    )
    return {
        "matrix": Note(name, rule.rate, _names(state_codecs(config))),
        "embedding": table,
        "head": table,
        "vector": Note(fallback, rule.fallback_rate, few),
        "frozen": Note("none", None, {}),
    }


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
