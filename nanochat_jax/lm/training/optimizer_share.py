"""Timing: a compiled call, and the optimizer's share of a training step."""

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax
from jaxtyping import Array, Float32, Int32

from nanochat_jax.lm.model import activation_sharding, gpt, next_token_loss
from nanochat_jax.lm.training.accumulate import mean_gradient
from nanochat_jax.lm.training.run import Run
from nanochat_jax.optimizer import roles

T = TypeVar("T")
R = TypeVar("R")
State = TypeVar("State", bound=Any)  # a `TrainState`

TURNS = 5
"""Number of steps to measure, enough for a stable median."""


def timed(call: Callable[[T], R], argument: T) -> tuple[float, R]:
    """Returns the seconds of a call until its result is ready, and the result.

    Args:
      call: Function to time.
      argument: Its argument; it is ready before the clock starts.
    """
    jax.block_until_ready(argument)
    started = time.perf_counter()
    result = jax.block_until_ready(call(argument))
    return time.perf_counter() - started, result


class OptimizerShare:
    """Measures within a run which share of a step is not its forward and backward pass.

    The rest is clipping, GaLore, Newton-Schulz, codecs, weight decay and the addition
    to the parameters. Of `TURNS` steps the loss and gradient are computed once more, on
    their own, and timed beside the step. This takes the time of as many passes and of
    compiling one, and no memory that the step does not take; the run's numbers are the
    same bit for bit.

    Attributes:
      seconds: Time spent on it so far; the speed of training leaves it out.
    """

    def __init__(self, run: Run):
        """Compiles nothing yet.

        Args:
          run: The run.
        """
        self._mesh, self._passes = run.mesh, _loss_and_norm(run)
        self._shares: list[float] = []
        self.seconds = 0.0

    @property
    def wanted(self) -> bool:
        """Whether more steps are to be timed."""
        return len(self._shares) < TURNS

    @property
    def median(self) -> float | None:
        """The share of the median step; `None` before the first.

        Usually from 0 to 1; where the optimizer takes next to no time, it may come out
        a little below 0.
        """
        return statistics.median(self._shares) if self._shares else None

    def take(
        self,
        train_step: Callable[[State, Any], tuple[State, Any]],
        state: State,
        batch: Any,
    ) -> tuple[State, Any]:
        """Takes a step and measures its share.

        Args:
          train_step: The compiled step.
          state: Where it begins; it is donated.
          batch: Its batch, int32 `[A, B, S + 1]`.

        Returns:
          State and metrics, from `train_step`.
        """
        passes = lambda params: self._passes(params, batch)
        with activation_sharding.using(self._mesh):
            if not self._shares:
                self.seconds += timed(passes, state.params)[0]  # compiles, and warms up
            alone, _ = timed(passes, state.params)
        self.seconds += alone
        whole, result = timed(lambda state: train_step(state, batch), state)
        self._shares.append(1 - alone / whole)
        return result


def _loss_and_norm(run: Run) -> Callable[[gpt.Params, Any], Any]:
    """Returns the compiled forward and backward pass, all microbatches of a step."""
    frozen = roles.frozen_by(run.config.freeze, run.params, run.config.groups)
    loss_fn = lambda params, batch: next_token_loss(
        run.graphdef, roles.stop_gradients(params, frozen), batch
    )

    @jax.jit
    def passes(
        params: gpt.Params, batch: Int32[Array, "A B S+1"]
    ) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
        loss, grads = mean_gradient(loss_fn, params, batch)
        return loss, optax.tree.norm(grads)  # without a use, they would be left out

    return passes
