"""The first signal asks for a stop; the second one ends the process."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nanochat_jax.lm.runtime.stop import StopSignals

TWICE = """
    import os, signal, sys
    from nanochat_jax.lm.runtime.stop import StopSignals

    with StopSignals() as stop:
        first, second = map(int, sys.argv[1:])
        print(stop(1), flush=True)
        os.kill(os.getpid(), first)
        print(stop(2), stop.received.name, flush=True)
        os.kill(os.getpid(), second)
        print("still here", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_handlers_come_back(number, capfd):
    before = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as stop:
        assert not stop(1)
        os.kill(os.getpid(), number)
        assert stop(1)
        assert stop(2)
    assert stop.received == number
    after = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)]
    assert after == before
    assert f"{number.name}: stopping after this step" in capfd.readouterr().err


def test_handlers_come_back_after_an_exception():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="boom"), StopSignals():
        raise ValueError("boom")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)],
)
def test_a_second_signal_of_either_kind_ends_the_process_at_once(first, second):
    code, numbers = textwrap.dedent(TWICE), [str(int(first)), str(int(second))]
    done = subprocess.run(
        [sys.executable, "-c", code, *numbers],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "False\nTrue SIGTERM\n"
    assert done.returncode == -second
