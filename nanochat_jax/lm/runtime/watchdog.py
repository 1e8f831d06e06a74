"""Reports which process is late when training on several of them stands still.

One process that hangs stops all others in the next collective, without a message. So
each process writes its step to the key-value store of JAX's coordination service, and
when no step is done for a while, one of the waiting processes names the late ones.
"""

import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Self

import jax

SECONDS = 60.0
"""Time without a step after which the late processes are named."""

_FOLDER = "watchdog/"


def coordination_client() -> Any:
    """Returns the client of JAX's coordination service; `None` for a single process.

    Raises:
      RuntimeError: If this version of JAX keeps the client elsewhere.
    """
    if jax.process_count() == 1:
        return None
    try:
        from jax._src import distributed  # JAX has no public name for the client

        return distributed.global_state.client
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            "several processes need the client of JAX's coordination service, which "
            f"JAX {jax.__version__} does not have at `jax._src.distributed`. Install "
            "the version in `constraints.txt`, or train in one process."
        ) from error


class Watchdog:
    """Watches over the processes in a thread; a context manager."""

    def __init__(self, seconds: float = SECONDS):
        """Starts nothing yet.

        Args:
          seconds: Time without a step after which the late processes are named.
        """
        self._seconds, self._step = seconds, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()

    def at(self, step: int) -> None:
        """Sets the number of steps that this process has done."""
        self._step = step

    def _watch(self) -> None:
        own, store = jax.process_index(), coordination_client()
        seen, since, told = -1, time.monotonic(), False
        while not self._ended.wait(self._seconds / 8):
            store.key_value_set(f"{_FOLDER}{own}", str(self._step), True)
            if self._step != seen:
                seen, since, told = self._step, time.monotonic(), False
            elif not told and time.monotonic() - since > self._seconds:
                told = True
                pairs = store.key_value_dir_get(_FOLDER)
                steps = {int(key.removeprefix(_FOLDER)): int(x) for key, x in pairs}
                if own == speaker(steps):
                    text = late_processes(steps, self._seconds)
                    print(text, file=sys.stderr, flush=True)


def speaker(steps: Mapping[int, int]) -> int:
    """Returns the process that reports: the first with the most steps done.

    Args:
      steps: Steps done, by process.
    """
    return min(process for process in steps if steps[process] == max(steps.values()))


def late_processes(steps: Mapping[int, int], seconds: float) -> str:
    """Returns in words which processes are late.

    Example:
      >>> late_processes({0: 8, 1: 8, 2: 7}, 60.0)
      'No step for 60 s: processes [2] have done 7, the others 8.'

    Args:
      steps: Steps done, by process.
      seconds: Time since the last step.
    """
    most, least = max(steps.values()), min(steps.values())
    late = [process for process in sorted(steps) if steps[process] < most]
    who = f"processes {late} have done {least}, the others {most}."
    if not late:
        who = f"all processes have done {most}, and wait for their devices."
    return f"No step for {seconds:g} s: {who}"
