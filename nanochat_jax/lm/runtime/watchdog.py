"""Says which process is late when several of them stand still.

One process that hangs stops all others in the next collective, without a word. Here
each writes how far it is to the store of JAX's coordination service, and when nothing
has moved for a while, one that is waiting says for whom.
"""

import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Self

import jax
from jax._src import distributed  # the store has no public name

SECONDS = 60.0
"""How long nothing moves before something is said."""

_FOLDER = "watchdog/"


def client() -> Any:
    """Returns the client of JAX's coordination service, if there is one."""
    return distributed.global_state.client


class Watchdog:
    """Watches in a thread; a context manager."""

    def __init__(self, seconds: float = SECONDS):
        """Starts nothing yet.

        Args:
          seconds: How long nothing moves before something is said.
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
        """Notes how many steps this process has done."""
        self._step = step

    def _watch(self) -> None:
        own, store = jax.process_index(), client()
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
                    text = describe(steps, self._seconds)
                    print(text, file=sys.stderr, flush=True)


def speaker(steps: Mapping[int, int]) -> int:
    """Returns the process that speaks: the first of those that are furthest.

    Args:
      steps: Steps done, by process.
    """
    return min(process for process in steps if steps[process] == max(steps.values()))


def describe(steps: Mapping[int, int], seconds: float) -> str:
    """Returns in words who is late.

    Example:
      >>> describe({0: 8, 1: 8, 2: 7}, 60.0)
      'No step for 60 s: processes [2] have done 7, the others 8.'

    Args:
      steps: Steps done, by process.
      seconds: How long that has been so.
    """
    most, least = max(steps.values()), min(steps.values())
    late = [process for process in sorted(steps) if steps[process] < most]
    who = f"processes {late} have done {least}, the others {most}."
    if not late:
        who = f"all processes have done {most}, and wait for their devices."
    return f"No step for {seconds:g} s: {who}"
