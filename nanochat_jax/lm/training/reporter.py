"""Reports of a run: metrics, evaluations, speed, and samples of text."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nanochat_jax.lm.model import Params, count_flops_per_token
from nanochat_jax.lm.runtime import utilization
from nanochat_jax.lm.tracking import Display, Sink
from nanochat_jax.lm.training import guard
from nanochat_jax.lm.training.evaluation import Evaluator
from nanochat_jax.lm.training.optimizer_share import OptimizerShare
from nanochat_jax.lm.training.run import Run
from nanochat_jax.optimizer import schedule

Sample = Callable[[Params, int], str]
"""Parameters and steps done, to text."""


class Reporter:
    """Reports of a run to a display and sinks, at the intervals of its settings.

    Attributes:
      share: Measurement of the optimizer's share of a step, or `None`.
    """

    def __init__(
        self,
        run: Run,
        step: int,
        display: Display,
        sinks: Sequence[Sink] = (),
        sample: Sample | None = None,
        share: OptimizerShare | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Starts the clock.

        Args:
          run: The run.
          step: Steps done before.
          display: Where metrics and samples are shown.
          sinks: Where metrics are written.
          sample: Returns text from the model, if there is to be any.
          share: Measures the optimizer's share of a step, if that is asked for.
          clock: Returns seconds.
        """
        self._config = run.config
        self._devices = (
            jax.devices()[:1] if run.mesh is None else [*run.mesh.devices.flat]
        )
        self._display, self._sinks = display, sinks
        self._sample, self.share = sample, share
        self._evaluate = Evaluator(run)
        self._rate = schedule(run.config, run.config.lr)
        self._flops = count_flops_per_token(run.config, run.config.sequence)
        self._clock, self._started = clock, clock()
        self._measure_from(step)

    def start(self, params: Params) -> None:
        """Reports the loss before the first step."""
        self._report(0, self._evaluate(params))
        self._measure_from(0)

    def reads(self, done: int) -> bool:
        """Returns whether weights are evaluated, or sampled from, after a step."""
        config, last = self._config, done == self._config.total_steps
        sampled = self._sample is not None and due(done, config.sample_interval)
        return last or due(done, config.eval_interval) or sampled

    def step(self, done: int, params: Params, values: Mapping[str, Any]) -> None:
        """Reports the metrics due after a step; blocks on the step only if any are.

        Args:
          done: Steps done.
          params: Weights after it that are evaluated.
          values: Its metrics.

        Raises:
          FloatingPointError: If the validation loss is not finite.
        """
        config, last = self._config, done == self._config.total_steps
        self._display.update(done)
        line: dict[str, Any] = {}
        if last or due(done, config.log_interval):
            line |= self._measure(done, values)
        if last or due(done, config.eval_interval):
            line |= self._evaluate(params)
        if line:
            self._report(done, line)
        sample_due = due(done, config.sample_interval) and not last
        if self._sample and sample_due:
            text = self._sample(params, done)
            self._display.print(f"\nA sample after step {done}:\n{text}\n")
        if line or sample_due:
            self._measure_from(done)

    def _measure(self, done: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the metrics of a step, and the speed since the last report."""
        config = self._config
        loss, skipped = float(values["loss"]), int(values["skipped"])
        now, (since, started) = self._clock(), self._from
        tokens = (done - since) * config.tokens_per_step
        speed = tokens / (now - self._aside - started)
        devices = self._devices
        return {
            "loss": loss,
            # The optimizer does not count steps that were skipped.
            "lr": float(jnp.asarray(self._rate(done - 1 - skipped))),
            "grad_norm": float(values["grad_norm"]),
            "skipped": skipped or None,
            "largest_score": float(values.get("largest_score", 0)) or None,
            "tokens_per_s": speed,
            "mfu": utilization.mfu(speed, self._flops, devices, config.compute_dtype),
            "optimizer_share": self.share and self.share.median,
            "memory_bytes": utilization.memory_in_use(),
            "elapsed_s": now - self._started,
        }

    def _report(self, done: int, values: Mapping[str, Any]) -> None:
        """Hands metrics to the display and to every sink, and looks at the loss."""
        line = {"step": done, "tokens": done * self._config.tokens_per_step, **values}
        self._display.log(line)
        for sink in self._sinks:
            sink.write(line)
        if not math.isfinite(values.get("val_loss", 0.0)):
            raise FloatingPointError(
                f"step {done}: the validation loss is {values['val_loss']}: parameters "
                f"are out of bounds. {guard.ADVICE}"
            )

    def _measure_from(self, done: int) -> None:
        """Restarts the measurement of speed, so that it leaves out reports."""
        self._from = done, self._clock() - self._aside

    @property
    def _aside(self) -> float:
        """Seconds that were spent on measuring the optimizer."""
        return self.share.seconds if self.share else 0.0


def due(step: int, interval: int) -> bool:
    """Returns whether something done every `interval` steps, if any, is due."""
    return interval > 0 and step % interval == 0
