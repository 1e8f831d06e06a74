"""Numbers of the update rules: learning rates, weight decays and betas."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax
from jax.typing import ArrayLike

from nanochat_jax.config import Group, OptimizerConfig, Rate


@dataclasses.dataclass(frozen=True)
class Rule:
    """Numbers of the update rules, which may be traced.

    Rates and decays may be schedules.

    Attributes:
      rate: Learning rate of the matrices.
      decay: Decoupled weight decay of the matrices.
      beta: Decay of the momentum of matrices, or a schedule.
      nesterov: Whether that momentum looks one step ahead.
      bias_correction: Whether its early bias is corrected.
      fallback_rate: Learning rate of embeddings, head and vectors.
      fallback_decay: Decoupled weight decay of embeddings and head.
      fallback_betas: Decays of AdamW or Lion.
      fallback_nesterov: Whether AdamW looks one step ahead.
      vector_b2: Decay of AdamW's second moment for vectors, if another.
      average: Start and horizon of the average of weights, if there is one.
    """

    rate: optax.ScalarOrSchedule
    decay: optax.ScalarOrSchedule
    beta: optax.ScalarOrSchedule
    fallback_rate: optax.ScalarOrSchedule
    fallback_decay: optax.ScalarOrSchedule
    fallback_betas: tuple[ArrayLike, ArrayLike]
    nesterov: bool = True
    bias_correction: bool = False
    fallback_nesterov: bool = False
    vector_b2: ArrayLike | None = None
    average: tuple[int, int] | None = None

    @classmethod
    def of(cls, config: OptimizerConfig) -> "Rule":
        """Returns the numbers that a configuration has."""
        lion = config.fallback == "lion"
        return cls(
            rate=schedule(config, config.lr),
            decay=decay_schedule(config, config.weight_decay),
            beta=momentum_schedule(config, config.muon_momentum),
            fallback_rate=schedule(config, config.fallback_peak_lr),
            fallback_decay=decay_schedule(config, config.fallback_peak_decay),
            fallback_betas=config.lion_betas if lion else config.adam_betas,
            vector_b2=config.vector_adam_b2,
            average=config.average,
        )


def in_group(
    config: OptimizerConfig, rule: Rule, group: Group | None, *, decays: bool = True
) -> tuple[OptimizerConfig, Rule]:
    """Returns settings and numbers of the parameters of a group.

    Args:
      config: Settings of the optimizer.
      rule: Numbers of all parameters.
      group: The group, if there is one.
      decays: Whether weight decay for everything but vectors is for them.
    """
    fallback = config.fallback
    if group is not None and group.optimizer in ("adamw", "lion"):
        fallback = group.optimizer
    changed: dict[str, Any] = {}
    if fallback != config.fallback:
        lion = fallback == "lion"
        changed["fallback_betas"] = config.lion_betas if lion else config.adam_betas
    if not decays:
        changed["fallback_decay"] = 0.0
        if rule.vector_b2 is not None and fallback == "adamw":
            beta, _ = changed.get("fallback_betas", rule.fallback_betas)
            changed["fallback_betas"] = (beta, rule.vector_b2)
    if group is None:
        return config, _changed(rule, changed)
    if group.betas is not None:
        changed["fallback_betas"] = group.betas
    if group.lr is not None:
        falls = config.warmup_steps or config.total_steps is not None
        rate = schedule(config, group.lr) if falls else group.lr
        changed |= {"rate": rate, "fallback_rate": rate}
    if group.weight_decay is not None:
        decay = decay_schedule(config, group.weight_decay)
        changed |= {"decay": decay, "fallback_decay": decay}
    if group.muon_momentum is not None:
        changed["beta"] = momentum_schedule(config, group.muon_momentum)
    config = dataclasses.replace(
        config, groups=(), fallback=fallback, vector_adam_b2=None,  # which `rule` has
        muon_scale=group.muon_scale or config.muon_scale,
    )  # fmt: skip
    return config, _changed(rule, changed)


def _changed(rule: Rule, numbers: Mapping[str, Any]) -> Rule:
    """Returns a rule with other numbers, schedules where it has schedules."""
    alike = {name: _like(getattr(rule, name), x) for name, x in numbers.items()}
    return dataclasses.replace(rule, **alike)


def _like(other: Any, x: Any) -> Any:
    """Returns a number as a schedule if another number has one."""
    return optax.constant_schedule(x) if callable(other) and not callable(x) else x


def alike(rules: Mapping[Any, Rule]) -> dict[Any, Rule]:
    """Returns rules that have schedules for the same numbers.

    A schedule counts steps, and a state must not tell which numbers have one.

    Args:
      rules: Rules by name.
    """
    changed: dict[Any, dict[str, Any]] = {name: {} for name in rules}
    for field in ("rate", "decay", "beta", "fallback_rate", "fallback_decay"):
        values = {name: getattr(rule, field) for name, rule in rules.items()}
        one = next(filter(callable, values.values()), None)
        for name, x in values.items():
            changed[name][field] = _like(one, x)
    return {
        name: dataclasses.replace(rule, **changed[name]) for name, rule in rules.items()
    }


def scaled(rate: optax.ScalarOrSchedule, factor: float) -> optax.ScalarOrSchedule:
    """Returns a rate times a number.

    Args:
      rate: A number, or a schedule.
      factor: The number.
    """
    return (lambda count: factor * rate(count)) if callable(rate) else factor * rate


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


def decay_schedule(config: OptimizerConfig, peak: float) -> optax.ScalarOrSchedule:
    """Builds the weight decay by step.

    Args:
      config: Settings of the schedule.
      peak: Weight decay of the first step.
    """
    if config.weight_decay_schedule == "constant" or config.total_steps is None:
        return peak
    if config.weight_decay_schedule == "cosine":
        return optax.cosine_decay_schedule(peak, config.total_steps)
    return optax.linear_schedule(peak, 0.0, config.total_steps)


def momentum_schedule(config: OptimizerConfig, last: float) -> optax.ScalarOrSchedule:
    """Builds the decay of the momentum by step.

    Args:
      config: Settings of the schedule.
      last: Decay after the warm-up.
    """
    steps = config.muon_momentum_warmup_steps
    if not steps:
        return last
    return optax.linear_schedule(config.muon_momentum_start, last, steps)
