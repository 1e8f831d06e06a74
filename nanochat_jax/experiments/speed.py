"""Speed of the training steps of several runs, side by side.

Runs timed one after another meet the machine in different states, so the ratio of their
speeds says little. Here runs take turns in one process, and ratios are taken within a
turn.
"""

import statistics
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.lm.training import (
    Run,
    TrainState,
    compile_train_step,
    init_state,
    timed,
    train_batches,
)

BURST = 4
"""Timed steps of a burst, after its first."""


class Speed(NamedTuple):
    """Speed of one run.

    Attributes:
      tokens_per_s: Tokens trained on per second, in the median turn.
      turns: Seconds per step, by turn.
    """

    tokens_per_s: float
    turns: list[float]

    def ratio(self, other: "Speed") -> float:
        """Returns how many times faster this is than `other`, in the median turn."""
        pairs = zip(other.turns, self.turns, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def side_by_side(runs: Mapping[str, Run], steps: int) -> dict[str, Speed]:
    """Times the compiled steps of runs in turns.

    The first step of a burst is step 0, at which GaLore finds its basis; its extra time
    is divided by the steps between two refreshes. All states are held at once.

    Args:
      runs: Runs to time, of one batch shape.
      steps: Steps to time of each run, rounded up to whole bursts.

    Returns:
      Speeds by name.
    """
    compiled = {name: compile_train_step(run) for name, run in runs.items()}
    states = {name: init_state(run) for name, run in runs.items()}
    turns: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(1 + -(-steps // BURST)):
        for name, run in runs.items():
            seconds = _seconds_a_step(run, compiled[name], states[name])
            if turn:  # the first one warms up
                turns[name].append(seconds)
    return {
        name: Speed(
            run.config.tokens_per_step / statistics.median(turns[name]), turns[name]
        )
        for name, run in runs.items()
    }


def _seconds_a_step(run: Run, step: jax.stages.Compiled, state: TrainState) -> float:
    """Returns the mean seconds of a step in one burst, refreshes included."""
    config, batch = run.config, train_batches(run.config, run.corpus)(0)
    state = jax.tree.map(jnp.copy, state)  # it is donated
    seconds = []
    for _ in range(1 + BURST):
        taken, (state, _) = timed(lambda state: step(state, batch), state)
        seconds.append(taken)
    first, usual = seconds[0], float(np.median(seconds[1:]))
    if not config.use_galore:
        return usual
    return usual + max(first - usual, 0.0) / config.galore_update_freq
