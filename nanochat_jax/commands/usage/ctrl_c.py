"""Ctrl-C while compiled code works, of which Python by itself hears only afterwards."""

import contextlib
import functools
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

_PATIENCE, _AGAIN = 1.0, 0.05


@contextlib.contextmanager
def heard(end: Callable[[], int]) -> Iterator[threading.Event]:
    """Ends the process on Ctrl-C even within a long call of compiled code.

    Python raises `KeyboardInterrupt` when such a call returns. A thread waits a second
    for that, and ends the process if it has not come to it. While a package is imported
    the process ends at once, since compiled packages print the interrupt, or crash. It
    leaves Ctrl-C alone while another handler of SIGINT is set.

    Args:
      end: Says that the command was interrupted; returns the exit code.

    Yields:
      An event that is set once Ctrl-C was pressed.
    """
    raised = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield raised
        return

    def interrupt(_: int, frame: types.FrameType | None) -> None:
        raised.set()
        if _is_import(frame):
            os._exit(end())
        raise KeyboardInterrupt

    def received(number: int) -> None:
        waits = signal.getsignal(signal.SIGINT) is interrupt
        if number == signal.SIGINT and waits and not raised.wait(_PATIENCE):
            os._exit(end())

    with _signals_to(received), _raised_again(raised):
        signal.signal(signal.SIGINT, interrupt)
        try:
            yield raised
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_import(frame: types.FrameType | None) -> bool:
    """Returns whether a frame works for an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def _signals_to(received: Callable[[int], object]) -> Iterator[None]:
    """Calls a function with the number of each signal, in a thread and at once."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while number := os.read(reader, 1):
            received(number[0])

    thread = threading.Thread(target=watch, daemon=True)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)


@contextlib.contextmanager
def _raised_again(raised: threading.Event) -> Iterator[None]:
    """Raises an interrupt anew that came in a callback which cannot raise.

    JAX has such a callback in the garbage collector. Python prints what is raised there
    and goes on.

    Args:
      raised: Cleared until it is raised anew.
    """
    before, main = sys.unraisablehook, threading.main_thread().ident or 0
    press = functools.partial(signal.pthread_kill, main, signal.SIGINT)

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            raised.clear()
            threading.Timer(_AGAIN, press).start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
