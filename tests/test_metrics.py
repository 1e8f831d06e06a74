"""The metrics file survives crashes, and holds every step once."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.lm.tracking.jsonl import MetricsWriter, read_metrics

METRICS = {
    "step": 120,
    "loss": 2.34567,
    "lr": 3e-4,
    "grad_norm": 0.91234,
    "tokens_per_s": 123_456.0,
    "elapsed_s": 3723.4,
    "val_loss": 2.5,
    "val_bpb": 1.75,
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def write(path, steps):
    with MetricsWriter(path) as writer:
        for step in steps:
            writer.write({"step": step, "loss": step / 3})


def steps(path):
    return [record["step"] for record in read_metrics(path)]


def test_what_is_written_is_read_back(path):
    with MetricsWriter(path) as writer:
        writer.write(METRICS)
        writer.write({"step": 130, "loss": 1 / 3, "val_loss": None})
        # Each line is there at once, not only when the writer is closed.
        assert read_metrics(path) == [METRICS, {"step": 130, "loss": 1 / 3}]


def test_arrays_of_one_number_are_numbers(path):
    with MetricsWriter(path) as writer:
        writer.write({"step": np.int64(1), "loss": jnp.float32(0.5)})
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n'


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_stay_valid_json(path, number):
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "loss": number})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None}


def test_a_second_writer_appends(path):
    write(path, [1, 2])
    write(path, [3])
    assert steps(path) == [1, 2, 3]


@pytest.mark.parametrize(("step", "kept"), [(-1, []), (2, [1, 2]), (9, [1, 2, 3, 4])])
def test_resuming_drops_later_lines(path, step, kept):
    write(path, [1, 2, 3, 4])
    lines = path.read_text().splitlines(keepends=True)
    with MetricsWriter(path) as writer:
        writer.resume(step)
        assert path.read_text() == "".join(lines[: len(kept)])
        writer.write({"step": 99})
    assert steps(path) == [*kept, 99]
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_resuming_works_before_the_file_is_opened(path):
    writer = MetricsWriter(path)
    writer.resume(3)
    assert not path.exists()
    write(path, [1, 2, 3])
    writer.resume(2)
    assert steps(path) == [1, 2]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step"', "{", '{"a": "\udcff'])
def test_a_torn_last_line_is_dropped(path, torn):
    write(path, [1, 2])
    with path.open("a", errors="surrogateescape") as file:
        file.write(torn)
    assert steps(path) == [1, 2]
    with MetricsWriter(path) as writer:
        writer.resume(2)
        writer.write({"step": 3})
    assert steps(path) == [1, 2, 3]


def test_a_crash_while_resuming_leaves_the_file(path, monkeypatch):
    write(path, [1, 2, 3])
    before = path.read_text()

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(path).resume(1)
    assert path.read_text() == before


def test_other_broken_lines_are_refused_with_their_numbers(path):
    write(path, [1])
    with path.open("a") as file:
        file.write('oops\n{"step": 2}\n[3]\n{"loss": 1}\n')
    for read in (lambda: read_metrics(path), lambda: MetricsWriter(path).resume(1)):
        with pytest.raises(
            ValueError, match=r"which lines \[2, 4, 5\] are not"
        ) as info:
            read()
        assert str(path) in str(info.value)


def test_a_missing_file_is_refused_and_not_made(path):
    with pytest.raises(ValueError, match="no such file"):
        read_metrics(path)
    assert not path.parent.exists()


def test_a_closed_writer_goes_on_where_it_stopped(path):
    writer = MetricsWriter(path)
    writer.close()
    assert not path.parent.exists()
    for step in (1, 2):
        writer.write({"step": step})
        writer.close()
    assert steps(path) == [1, 2]
