"""The profiler traces the steps asked for, and no others."""

import jax
import jax.numpy as jnp
import pytest

from nanochat_jax.lm.training.profiler import StepProfiler, parse_steps


@pytest.fixture
def calls(monkeypatch):
    """Records when a trace would be started and stopped."""
    calls = []
    trace = jax.profiler
    monkeypatch.setattr(trace, "start_trace", lambda path: calls.append("start"))
    monkeypatch.setattr(trace, "stop_trace", lambda: calls.append("stop"))
    return calls


def steps(traced, calls, first, total):
    """Takes steps, and returns the record with the steps among it."""
    for step in range(first, total):
        traced.at(step)
        calls.append(step)
    traced.close()
    traced.close()
    return calls


@pytest.mark.parametrize(
    ("first", "total", "expected"),
    [
        (0, 6, [0, 1, "start", 2, 3, "stop", 4, 5]),
        (3, 6, ["start", 3, "stop", 4, 5]),  # a run resumed in the middle
        (0, 3, [0, 1, "start", 2, "stop"]),  # one that ends in the middle
        (4, 6, [4, 5]),
        (0, 2, [0, 1]),
    ],
)
def test_the_steps_from_start_up_to_stop_are_traced(first, total, expected, calls):
    assert steps(StepProfiler(2, 4, "trace"), calls, first, total) == expected


def test_a_trace_is_written_and_has_the_steps_in_it(tmp_path):
    f = jax.jit(lambda x: x @ x)
    traced, x = StepProfiler(1, 3, tmp_path / "trace"), jnp.eye(8)
    for step in range(4):
        traced.at(step)
        x = f(x)
        assert (tmp_path / "trace").exists() == (step == 3)
    (file,) = (tmp_path / "trace").rglob("*.xplane.pb")
    trace = file.read_bytes()
    assert b"step_num" in trace and b"train" in trace


def test_steps_are_given_as_a_slice():
    assert parse_steps("10:13") == (10, 13)
    assert parse_steps("0:1") == (0, 1)


@pytest.mark.parametrize("text", ["", "3", "3:", ":3", "3:3", "4:3", "-1:3", "1:2:3"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=r"A:B with A < B.*got ") as error:
        parse_steps(text)
    assert repr(text) in str(error.value)
