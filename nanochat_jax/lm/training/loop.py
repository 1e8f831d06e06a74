"""The loop around the compiled step: what the host does between two steps."""

import contextlib
import functools
from collections.abc import Callable

import jax

from nanochat_jax.lm.checkpoints import Checkpoints
from nanochat_jax.lm.training import guard
from nanochat_jax.lm.training.device_batches import feed
from nanochat_jax.lm.training.profiler import StepProfiler
from nanochat_jax.lm.training.read_out import read_out
from nanochat_jax.lm.training.reporter import Reporter, due
from nanochat_jax.lm.training.run import Run
from nanochat_jax.lm.training.step import TrainState


def fit(
    run: Run,
    state: TrainState,
    train_step: jax.stages.Compiled,
    reporter: Reporter,
    *,
    checkpoints: Checkpoints | None = None,
    profiler: StepProfiler | None = None,
    stop: Callable[[int], bool] = lambda step: False,
) -> TrainState:
    """Trains from `state` to the last step of the run, or until it is to stop.

    Args:
      run: The run.
      state: Initial state; it is donated.
      train_step: The compiled step, from `compile_train_step`.
      reporter: Reporter of the run, from the step of `state` on.
      checkpoints: Checkpoints to save states to, if any.
      profiler: Tracer of some of the steps.
      stop: Function of the steps done, called after each step: whether to save and stop
        there.

    Returns:
      The state after the last step.

    Raises:
      FloatingPointError: If `max_skipped_steps` in a row were skipped, or a validation
        loss is not finite. No checkpoint of that step is left.
    """
    config, first, share = run.config, int(state.step), reporter.share
    if first == 0:
        reporter.start(state.params)
    previous, weights = None, read_out(run)
    with contextlib.closing(feed(run, first, config.total_steps)) as batches:
        for step, batch in batches:
            if profiler:
                profiler.at(step)
            take_step = train_step
            if share and share.wanted and due(step + 1, config.log_interval):
                take_step = functools.partial(share.take, take_step)
            state, values = take_step(state, batch)
            if previous:
                # One step stays in flight while the host looks at the one before.
                guard.check(previous, step, config.max_skipped_steps)
            previous, done = values, step + 1
            shown = weights(state) if reporter.reads(done) else state.params
            reporter.step(done, shown, values)
            stopping = stop(done) or done == config.total_steps
            if checkpoints and (stopping or due(done, config.checkpoint_interval)):
                checkpoints.save(done, state, run.meta)
            if stopping:
                break
    if previous:
        guard.check(previous, int(state.step), config.max_skipped_steps)
    return state
