"""The metrics file survives crashes, and the display shows what it is given."""

import io
import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from nanochat_jax.lm.display import make_display
from nanochat_jax.lm.metrics import MetricsWriter, read_metrics

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


def test_writing_outside_the_context_is_refused(path):
    with pytest.raises(ValueError, match="`with` statement"):
        MetricsWriter(path).write({"step": 1})


def show(console):
    """Runs a display through a few steps and returns all that was printed."""
    table = Table("name", "bytes")
    table.add_row("momentum", "1234")
    with make_display(1000, start_step=100, console=console) as display:
        display.print("a [bold] word")
        display.print(table)
        for step in range(101, 121):
            display.update(step)
        display.log(METRICS)
        display.log({"step": 121, "loss": math.nan, "lr": None})
    return console.file.getvalue()


def test_plain_lines_show_the_numbers_given():
    console = Console(file=io.StringIO(), width=40)
    lines = show(console).splitlines()
    assert lines[0] == "a [bold] word"
    assert "1234" in "".join(lines[1:-2])
    assert lines[-2].startswith(
        "step  120/1000 | loss 2.3457 | lr 3.00e-04 | grad norm 0.912 | 123.5k tok/s | "
        "val loss 2.5000 | bpb 1.7500 | elapsed 1:02:03 | eta 0:00:"
    )
    assert lines[-1].startswith("step  121/1000 | loss nan | elapsed 0:00:0")


@pytest.mark.parametrize("width", [80, 140])
def test_the_bar_shows_the_numbers_given(width):
    console = Console(
        file=io.StringIO(), record=True, width=width, force_terminal=True, _environ={}
    )
    show(console)
    text = console.export_text()
    assert "a [bold] word" in text
    assert "1234" in text
    assert "step 120 | val loss 2.5000 | bpb 1.7500" in text
    frames = re.findall(r" *\d+/1000 .*?eta \S+", text.splitlines()[-1])
    assert {len(frame) for frame in frames} == {width}  # one line, all of it
    for part in (" 121/1000 ", "━━", "loss nan", "bpb 1.7500", "123.5k tok/s"):
        assert part in frames[-1]


def test_a_run_without_a_step_shows_no_time_left():
    console = Console(file=io.StringIO(), width=200)
    with make_display(10, console=console) as display:
        display.log({"step": 0, "val_loss": 1.0})
    line = console.file.getvalue()
    assert line.startswith(
        "step  0/10 | val loss 1.0000 | elapsed 0:00:00 | eta -:--:--"
    )
    assert line.count("\n") == 1
