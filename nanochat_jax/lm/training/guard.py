"""Skips harmful steps, inside the compiled step.

A step is skipped if its loss or its gradient is not finite, or, if that is asked for,
far above the usual. Then parameters and state of the optimizer stay as they are to the
bit, and only the data moves on. With `update_in_backward` the loss alone decides for
the step, and a layer whose gradient is not finite is skipped by itself; the step counts
as skipped then.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

WINDOW = 128
"""Length of the running means in steps; no earlier step counts as a spike."""


class Guard(NamedTuple):
    """Counts of steps, and running statistics of loss and gradient norm.

    Attributes:
      taken: Steps that were not skipped.
      skipped: Steps that were skipped.
      consecutive_skips: Consecutive skipped steps up to now.
      mean: Running means of loss and gradient norm, over the steps taken.
      variance: Their running variances.
    """

    taken: Int32[Array, ""]
    skipped: Int32[Array, ""]
    consecutive_skips: Int32[Array, ""]
    mean: Float32[Array, "2"]
    variance: Float32[Array, "2"]


def init() -> Guard:
    """Returns the guard before the first step."""
    # Each an array of its own, since the state is donated.
    counts = (jnp.zeros([], jnp.int32) for _ in range(3))
    moments = (jnp.zeros(2, jnp.float32) for _ in range(2))
    return Guard(*counts, *moments)


def judge(
    guard: Guard, loss: Array, grad_norm: Array, spike_skip: float = 0.0
) -> tuple[Bool[Array, ""], Guard]:
    """Decides whether a step is taken.

    Args:
      guard: Counts and statistics of the steps before.
      loss: Loss of the step.
      grad_norm: Norm of its gradient.
      spike_skip: Standard deviations above the running mean that are too many, for
        either; 0 for any number.

    Returns:
      Whether the step is taken, and the guard after it.
    """
    take = _is_usual(guard, 0, loss, spike_skip)
    take &= _is_usual(guard, 1, grad_norm, spike_skip)
    return take, count(guard, take, loss, grad_norm)


def judge_loss(guard: Guard, loss: Array, spike_skip: float = 0.0) -> Bool[Array, ""]:
    """Decides by its loss alone whether a step is taken, before there is a gradient.

    Args:
      guard: Counts and statistics of the steps before.
      loss: Loss of the step.
      spike_skip: As for `judge`.
    """
    return _is_usual(guard, 0, loss, spike_skip)


def count(guard: Guard, taken: Bool[Array, ""], loss: Array, grad_norm: Array) -> Guard:
    """Returns the guard after a step.

    Args:
      guard: Counts and statistics of the steps before.
      taken: Whether the step was taken, in full.
      loss: Its loss.
      grad_norm: Norm of its gradient.
    """
    seen = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    # The mean of all steps at first, then an exponential one.
    weight = 1 / jnp.minimum(guard.taken + 1, WINDOW).astype(jnp.float32)
    off = seen - guard.mean
    after = Guard(
        guard.taken + 1,
        guard.skipped,
        jnp.zeros_like(guard.consecutive_skips),
        guard.mean + weight * off,
        (1 - weight) * (guard.variance + weight * off**2),
    )
    passed = guard._replace(
        skipped=guard.skipped + 1, consecutive_skips=guard.consecutive_skips + 1
    )
    return jax.tree.map(lambda x, y: jnp.where(taken, x, y), after, passed)


def _is_usual(guard: Guard, i: int, value: Array, spike_skip: float) -> Bool[Array, ""]:
    """Returns whether a loss, `i = 0`, or a norm, 1, is finite and no spike."""
    value = value.astype(jnp.float32)
    usual = jnp.isfinite(value)
    if spike_skip:
        limit = guard.mean[i] + spike_skip * jnp.sqrt(guard.variance[i])
        usual &= (value <= limit) | (guard.taken < WINDOW)
    return usual


ADVICE = (
    "Look into the data of these steps. With a lower `lr` and `fallback_lr` train "
    "again in a new `--checkpoint-dir`, from the start or, by `--init-from "
    "FOLDER/STEP`, from the parameters of an earlier checkpoint."
)
"""What to do about a run that diverged: a resumed run keeps its learning rates."""


def check(values: Mapping[str, Any], step: int, most: int) -> int:
    """Raises an error after too many consecutive skipped steps.

    Args:
      values: Metrics of a step. They are waited for.
      step: Steps done, that one among them.
      most: Consecutive skipped steps at which a run stops.

    Returns:
      Steps skipped so far.

    Raises:
      FloatingPointError: If that many were skipped.
    """
    if int(values["consecutive_skips"]) >= most:
        raise FloatingPointError(_complaint(values, step))
    return int(values["skipped"])


def _complaint(values: Mapping[str, Any], step: int) -> str:
    """Returns why a run stops, and what to do."""
    row = int(values["consecutive_skips"])
    seen = {
        "loss": float(values["loss"]),
        "gradient norm": float(values["grad_norm"]),
    }
    wrong = [f"the {name} is {x}" for name, x in seen.items() if not math.isfinite(x)]
    spike = [
        f"the loss, {seen['loss']:.4g}, or the gradient norm, "
        f"{seen['gradient norm']:.4g}, is far above its running mean (`spike_skip`)"
    ]
    return (
        f"step {step}: {' and '.join(wrong or spike)}. This and the steps before it, "
        f"{row} in a row, were skipped, at which a run stops (`max_skipped_steps`). "
        f"Parameters are those of step {step - row}. {ADVICE}"
    )
