"""An orderly stop on SIGTERM, as schedulers send it, and on Ctrl-C."""

import os
import signal
import sys
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SHOW_CURSOR = "\x1b[?25h"  # which a progress display hides


class StopSignals:
    """Takes the first signal as a request to stop, to be asked for between two steps.

    It is a context manager, for the main thread; leaving it brings back the handlers
    that were there. A second signal ends the process at once, by the system, also while
    a device or a disk is waited for.

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

    def __enter__(self) -> Self:
        self._before = {name: signal.signal(name, self._ask) for name in _SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def __call__(self, step: int) -> bool:
        """Returns whether to stop after this step.

        Args:
          step: Steps done. With several processes they are to agree on it.
        """
        return self.received is not None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for name in _SIGNALS:
            signal.signal(name, signal.SIG_DFL)
        # Straight to the file: the signal may have come in the midst of a `print`.
        cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""
        text = f"{cursor}\n{self.received.name}: stopping after this step. A second "
        os.write(2, f"{text}signal stops at once, without a checkpoint.\n".encode())
