"""Numbers of the update rules: learning rates, weight decays and betas."""

import dataclasses

import optax
from jax.typing import ArrayLike

from nanochat_jax.config import OptimizerConfig, Rate


@dataclasses.dataclass(frozen=True)
class Rule:
    """Numbers of the update rules, which may be traced.

    Rates and decays may be schedules.

    Attributes:
      rate: Learning rate of the matrices.
      decay: Decoupled weight decay of the matrices.
      beta: Decay of the momentum of matrices.
      nesterov: Whether that momentum looks one step ahead.
      bias_correction: Whether its early bias is corrected.
      fallback_rate: Learning rate of embeddings, head and vectors.
      fallback_decay: Decoupled weight decay of embeddings and head.
      fallback_betas: Decays of AdamW or Lion.
      fallback_nesterov: Whether AdamW looks one step ahead.
    """

    rate: optax.ScalarOrSchedule
    decay: optax.ScalarOrSchedule
    beta: ArrayLike
    fallback_rate: optax.ScalarOrSchedule
    fallback_decay: optax.ScalarOrSchedule
    fallback_betas: tuple[ArrayLike, ArrayLike]
    nesterov: bool = True
    bias_correction: bool = False
    fallback_nesterov: bool = False

    @classmethod
    def of(cls, config: OptimizerConfig) -> "Rule":
        """Returns the numbers that a configuration has."""
        lion = config.fallback == "lion"
        return cls(
            rate=schedule(config, config.lr),
            decay=config.weight_decay,
            beta=config.muon_momentum,
            fallback_rate=schedule(config, config.fallback_peak_lr),
            fallback_decay=config.weight_decay,
            fallback_betas=config.lion_betas if lion else config.adam_betas,
        )


def schedule(config: OptimizerConfig, peak: Rate) -> optax.Schedule:
    """Builds the learning rate by step: linear warm-up, plateau of "wsd", decay.

    Step `s` of `w` of warm-up has `(s + 1) / w` of the peak. The decay would reach
    `min_lr_frac` of it at `total_steps`, one step after the last; without that number
    the rate stays at its peak.

    Args:
      config: Settings of the schedule.
      peak: Highest rate, which may be traced; a schedule is returned as it is.
    """
    if callable(peak):
        return peak
    warmup, start, floor = config.warmup_steps, config.decay_start, config.min_lr_frac
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    plateau = optax.constant_schedule(peak)
    if config.total_steps is None or start is None:
        return optax.join_schedules([rise, plateau], [warmup])
    length = max(config.total_steps - start, 1)
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, length, alpha=floor)
    else:
        fall = optax.linear_schedule(peak, floor * peak, length)
    return optax.join_schedules([rise, plateau, fall], [warmup, start])
