"""Checks of the optimizer's settings that take more than the least value of a key."""

from typing import Any

from nanochat_jax.config import schema
from nanochat_jax.polynomials import FLOAT32_METHODS, default_steps, method_of


def all_checks(config: Any) -> list[schema.Check]:
    """Returns the checks of schedule, method, rank and groups.

    Args:
      config: An `OptimizerConfig`.
    """
    return [
        *_method_checks(config.ns_method, config.ns_steps, config.ns_dtype),
        *_rank_checks(config.galore_rank),
        *_schedule_checks(config),
        *_group_checks(config),
        *_adamw_checks(config),
    ]


def _schedule_checks(config: Any) -> list[schema.Check]:
    last, end = config.total_steps, "the run does, at step {} = total_steps"
    if config.schedule == "wsd":
        last = config.decay_start
        end = "the decay begins, at step {} = decay_start_frac x total_steps"
    required = last is not None or config.schedule == "wsd"
    fractions = {
        name: getattr(config, name)
        for name in ("decay_start_frac", "min_lr_frac", "average_start_frac")
    }
    to_the_end = {
        "average_horizon": config.average_horizon > 0,
        "weight_decay_schedule": config.weight_decay_schedule != "constant",
    }
    return [
        *(
            (0 <= value <= 1, f"`{name}` must lie in [0, 1], got {value}.")
            for name, value in fractions.items()
        ),
        *(
            (
                config.total_steps is not None or not needed,
                f"`total_steps` is required by `{name}`, which goes by it.",
            )
            for name, needed in to_the_end.items()
        ),
        (
            required,
            f'`total_steps` is required by `schedule = "{config.schedule}"`, whose '
            "rate falls until then.",
        ),
        (
            last is None or config.warmup_steps <= last,
            f"`warmup_steps` must end before {end.format(last)}, got "
            f"{config.warmup_steps}.",
        ),
    ]


def _group_checks(config: Any) -> list[schema.Check]:
    return [
        (
            group.optimizer in (None, "muon", config.fallback) or group.lr is not None,
            f"`lr` is required in the group {group.match!r}: `fallback_lr` is that of "
            f"{config.fallback}, not of {group.optimizer}.",
        )
        for group in config.groups
    ]


def _adamw_checks(config: Any) -> list[schema.Check]:
    used = {config.fallback, *(group.optimizer for group in config.groups)}
    return [
        (
            config.vector_adam_b2 is None or "adamw" in used,
            "`vector_adam_b2` is a number of AdamW, which nothing uses with "
            f'`fallback = "{config.fallback}"`. Leave it out.',
        )
    ]


def _rank_checks(rank: int | float | None) -> list[schema.Check]:
    allowed, wanted = rank is None or rank >= 1, "at least 1"
    if isinstance(rank, float):
        allowed, wanted = 0 < rank < 1, "an int of at least 1 or a fraction in (0, 1)"
    return [(allowed, f"`galore_rank` must be {wanted}, got {rank}.")]


def _method_checks(method: str, steps: int, dtype: str) -> list[schema.Check]:
    # Less than one step is what the key itself refuses.
    steps = steps if steps >= 1 else default_steps(method)
    try:
        method_of(method, steps)
    except ValueError as error:
        return [(False, str(error))]
    message = (
        f'`ns_dtype = "{dtype}"` is for Newton-Schulz: {method!r} runs in float32. '
        "Leave it out."
    )
    return [(method not in FLOAT32_METHODS or dtype != "bfloat16", message)]
