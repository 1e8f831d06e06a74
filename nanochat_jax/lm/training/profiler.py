"""A trace of some training steps, for XProf (TensorBoard) or Perfetto."""

import re
from pathlib import Path

import jax

from nanochat_jax.config import schema


class StepProfiler:
    """Traces the steps from `start` up to, and without, `stop`.

    Steps are counted by those before them, so the first of a run is step 0.
    """

    def __init__(self, start: int, stop: int, directory: str | Path):
        """Records which steps to trace; no trace starts yet.

        Args:
          start: First step to trace.
          stop: Step after the last one to trace.
          directory: Folder for the trace; it is made.
        """
        self._steps = range(start, stop)
        self._directory = str(directory)
        self._annotation: jax.profiler.StepTraceAnnotation | None = None

    def at(self, step: int) -> None:
        """Starts or stops the trace; to be called before each step.

        Args:
          step: Steps done.
        """
        tracing = self._annotation is not None
        if step in self._steps:
            if tracing:
                self._end_step()
            else:
                jax.profiler.start_trace(self._directory)
            self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
            self._annotation.__enter__()
        elif tracing:
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is being made."""
        if self._annotation is not None:
            # Dispatch is asynchronous: wait, so that the trace has the whole last step.
            jax.block_until_ready(jax.live_arrays())
            self._end_step()
            self._annotation = None
            jax.profiler.stop_trace()

    def _end_step(self) -> None:
        assert self._annotation is not None
        self._annotation.__exit__(None, None, None)


def parse_steps(text: str) -> tuple[int, int]:
    """Reads which steps to trace.

    Args:
      text: `"A:B"`, for the steps from A up to, and without, B, as in a slice.

    Returns:
      A and B.

    Raises:
      ValueError: If it is no such text, or there is no step in it.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text, re.ASCII)
    start, stop = map(int, found.groups()) if found else (0, 0)
    schema.require(
        (
            start < stop,
            "steps to profile must be given as A:B with A < B, such as 10:13 for "
            f"three steps from step 10 on, got {text!r}.",
        )
    )
    return start, stop
