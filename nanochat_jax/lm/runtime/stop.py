"""An orderly stop on SIGTERM, as schedulers send it, and on Ctrl-C.

Signals are asked for between two steps. With several processes, all stop after the same
step, though one alone got the signal.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from nanochat_jax.lm.runtime.watchdog import Watchdog

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SHOW_CURSOR = "\x1b[?25h"  # which a progress display hides


@contextlib.contextmanager
def stopping(mesh: Mesh | None) -> Iterator["StopSignals | SharedStop"]:
    """Handles signals, and watches over the other processes if there are any.

    Args:
      mesh: Devices of all processes; needed if there are several.

    Yields:
      A function of the steps done that returns whether to stop.
    """
    with StopSignals() as own:
        if mesh is None or jax.process_count() == 1:
            yield own
            return
        with Watchdog() as watch:
            yield SharedStop(own, mesh, watch.at)


class StopSignals:
    """Takes the first signal as a request to stop after the current step.

    A context manager, for the main thread; leaving it restores the previous handlers. A
    second signal ends the process at once, by the system, also while a device or a disk
    is waited for.

    Example:
      >>> with StopSignals() as stop:
      ...     stop(1)
      False

    Attributes:
      received: The signal that asked for the stop, if any did.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._teller: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._before = {name: signal.signal(name, self._ask) for name in _SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)
        if self._teller:
            self._teller.join()

    def __call__(self, step: int) -> bool:
        """Returns whether to stop after this step.

        Args:
          step: Steps done; `SharedStop` needs it, this process alone does not.
        """
        return self.received is not None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for name in _SIGNALS:
            signal.signal(name, signal.SIG_DFL)
        if sys.stderr.isatty():
            # The second signal ends the process before a display can show it again.
            os.write(2, _SHOW_CURSOR.encode())
        # A thread of its own: the signal may have come in the midst of a `print`.
        self._teller = threading.Thread(target=_tell, args=(self.received,))
        self._teller.start()


def _tell(received: signal.Signals) -> None:
    """Says that the run is about to stop, above a progress bar if there is one."""
    print(
        f"{received.name}: stopping after this step. A second signal stops at once, "
        "without a checkpoint.",
        file=sys.stderr,
        flush=True,
    )


class SharedStop:
    """Stops all processes after the same step, once one of them got a signal.

    After each step the devices compute the largest signal received, and the host reads
    the result of the step before. So no process waits for another on this account.

    Attributes:
      received: The signal that asked for the stop, if any did.
    """

    def __init__(
        self, own: StopSignals, mesh: Mesh, at: Callable[[int], object] = lambda _: None
    ):
        """Compiles nothing yet.

        Args:
          own: Signals to this process.
          mesh: Devices of all processes.
          at: Called with the number of each step that is done.
        """
        self.received: signal.Signals | None = None
        self._own, self._at = own, at
        self._before: Array | None = None
        self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        replicated = NamedSharding(mesh, PartitionSpec())
        self._largest: Callable[[Array], Array] = jax.jit(
            jnp.max, out_shardings=replicated
        )

    def __call__(self, step: int) -> bool:
        """Returns whether to stop after this step; all processes get the same answer.

        Args:
          step: Steps done.
        """
        self._at(step)
        own = np.full(jax.local_device_count(), self._own.received or 0, np.int32)
        received = jax.make_array_from_process_local_data(self._each, own)
        before, self._before = self._before, self._largest(received)
        if before is not None and int(before):
            self.received = signal.Signals(int(before))
        return self.received is not None
