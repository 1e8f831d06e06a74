"""Speed of training steps: of several runs side by side, and the optimizer's share.

What runs one after another meets a machine in different states, so a ratio of its
speeds says little. Here what is compared takes turns in one process, and ratios are
taken within a turn.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32, Int32

from nanochat_jax.lm import model, trainer
from nanochat_jax.lm.accumulate import mean_gradient
from nanochat_jax.lm.setup import Run, train_batches

T = TypeVar("T")
R = TypeVar("R")

BURST = 4
"""Timed steps of a burst, after its first."""


class Speed(NamedTuple):
    """Speed of one run.

    Attributes:
      tokens_per_s: Tokens trained on in a second, of the median turn.
      turns: Seconds a step, by turn.
    """

    tokens_per_s: float
    turns: list[float]

    def ratio(self, other: "Speed") -> float:
        """Returns how many times faster than `other` this is, in the median turn."""
        pairs = zip(other.turns, self.turns, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def side_by_side(runs: Mapping[str, Run], steps: int) -> dict[str, Speed]:
    """Times the compiled steps of runs in turns.

    The first step of a burst is step 0, at which GaLore finds its basis; its extra time
    is spread over the steps between two refreshes. All states are held at once.

    Args:
      runs: Runs to time, of one batch shape.
      steps: Steps to time of each, rounded up to whole bursts.

    Returns:
      Speeds by name.
    """
    compiled = {name: trainer.compile_train_step(run) for name, run in runs.items()}
    states = {name: trainer.init_state(run) for name, run in runs.items()}
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


def optimizer_share(
    run: Run, train_step: jax.stages.Compiled, *, turns: int = 8, seconds: float = 2.0
) -> float:
    """Measures which share of a training step is not its forward and backward pass.

    The step takes turns with its loss and gradient alone, which are compiled for this.
    The rest is clipping, GaLore, Newton-Schulz, codecs, weight decay and the addition
    to the parameters. Steps that change GaLore's basis are not among those counted, as
    long as most steps do not.

    Args:
      run: The run. A new state of it is held meanwhile; others are left alone.
      train_step: Its compiled step, from `trainer.compile_train_step`.
      turns: Least number of steps to time, after one that warms up.
      seconds: Least time to spend, as short steps vary much.

    Returns:
      The share of the median turn, usually from 0 to 1; where the optimizer takes next
      to no time, it may come out a little below 0.
    """
    gradient, batch = _loss_and_norm(run), _first_batch(run)
    state, shares, spent = trainer.init_state(run), [], 0.0
    while len(shares) <= turns or spent < seconds:
        passes, _ = _timed(lambda params: gradient(params, batch), state.params)
        whole, (state, _) = _timed(lambda state: train_step(state, batch), state)
        spent += passes + whole
        shares.append(1 - passes / whole)
    return statistics.median(shares[1:])


def _loss_and_norm(run: Run) -> Callable[[model.Params, np.ndarray], Any]:
    """Returns the compiled forward and backward pass, all microbatches of a step."""
    loss_fn = lambda params, batch: model.next_token_loss(run.graphdef, params, batch)

    @jax.jit
    def passes(
        params: model.Params, batch: Int32[Array, "A B S+1"]
    ) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
        loss, grads = mean_gradient(loss_fn, params, batch)
        return loss, optax.tree.norm(grads)  # without a use, they would be left out

    return passes


def _timed(call: Callable[[T], R], argument: T) -> tuple[float, R]:
    """Returns the seconds of a call, and what it returned once that is there."""
    jax.block_until_ready(argument)
    started = time.perf_counter()
    result = jax.block_until_ready(call(argument))
    return time.perf_counter() - started, result


def _first_batch(run: Run) -> np.ndarray:
    """Returns the first batch of a run, int32 `[A, B, S + 1]`."""
    config = run.config
    return train_batches(config, run.corpus)(0).reshape(
        config.grad_accum_steps, config.batch_size, config.sequence + 1
    )


def _seconds_a_step(
    run: Run, step: jax.stages.Compiled, state: trainer.TrainState
) -> float:
    """Returns the seconds of a step in one burst, with its share of a refresh."""
    config, batch = run.config, _first_batch(run)
    state = jax.tree.map(jnp.copy, state)  # it is donated
    seconds = []
    for _ in range(1 + BURST):
        taken, (state, _) = _timed(lambda state: step(state, batch), state)
        seconds.append(taken)
    first, usual = seconds[0], float(np.median(seconds[1:]))
    if not config.use_galore:
        return usual
    return usual + max(first - usual, 0.0) / config.galore_update_freq
