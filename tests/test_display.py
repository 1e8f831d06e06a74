"""The display shows the numbers it is given, on a terminal and elsewhere."""

import io
import math

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nanochat_jax.lm.tracking import chart
from nanochat_jax.lm.tracking.console import busy, make_display

METRICS = {
    "step": 120,
    "tokens": 245_760,
    "loss": 2.34567,
    "lr": 3e-4,
    "grad_norm": 0.91234,
    "tokens_per_s": 123_456.0,
    "elapsed_s": 3723.4,
    "memory_bytes": 1.234e9,
    "mfu": 0.4123,
    "optimizer_share": 0.123,
    "skipped": 2,
    "val_loss": 2.5,
    "val_bpb": 1.75,
}
SHOWN = (
    "loss 2.3457", "val bpb 1.7500", "skipped 2", "123.5k tok/s", "lr 3.00e-04",
    "grad norm 0.912", "optimizer 12%", "MFU 41.2%", "1.23 GB in use", "245.8k tokens",
)  # fmt: skip


def terminal(width):
    """A console like a terminal; a narrow one leaves out what does not fit."""
    return Console(file=io.StringIO(), width=width, force_terminal=True, _environ={})


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
    return console.file.getvalue()


def log(display, metrics):
    """Logs metrics and returns the lines at the bottom of the terminal after it."""
    display.log(metrics)
    console = display._progress.console
    with console.capture() as captured:
        console.print(display._progress.get_renderable())
    return plain(captured.get())


def plain(text):
    return [Text.from_ansi(line).plain.rstrip() for line in text.splitlines()]


def test_plain_lines_show_the_numbers_given():
    console = Console(file=io.StringIO(), width=40)
    *first, last = show(console).splitlines()
    assert first[0] == "a [bold] word"
    assert "1234" in "".join(first[1:])
    assert last.startswith("step  120/1000 | loss 2.3457 | skipped 2 | 123.5k tok/s | ")
    assert " | elapsed 1:02:03 | eta 0:00:" in last
    assert last.endswith(" | val loss 2.5000 | val bpb 1.7500")
    assert all(text in " ".join(last.split()) for text in SHOWN)


def test_plain_lines_stand_one_below_the_other():
    console = Console(file=io.StringIO(), width=40)
    small = {"tokens_per_s": 953.0, "mfu": 0.04, "optimizer_share": 0.0}
    with make_display(1000, console=console) as display:
        display.log(METRICS)
        display.log(METRICS | small | {"step": 1000, "tokens": 9, "grad_norm": 6.0})
    at = [
        [i for i, c in enumerate(line) if c == "|"]
        for line in console.file.getvalue().splitlines()
    ]
    assert at[0] == at[1] and len(at[0]) == 13


@pytest.mark.parametrize("width", [80, 140])
def test_a_terminal_shows_all_numbers_in_two_lines_below_a_bar(width):
    bar, *lines = log(make_display(1000, console=terminal(width)), METRICS)
    assert bar.startswith("step 120/1000 ━")
    assert "12% elapsed 0:00:0" in bar and " eta " in bar
    assert len(bar) == width
    assert len(lines) == 2 and max(map(len, lines)) <= width
    assert "   ".join(lines) == "   ".join(SHOWN)


@pytest.mark.parametrize("width", [20, 30, 40, 60])
def test_a_narrow_terminal_leaves_out_the_last_numbers(width):
    lines = log(make_display(1000, console=terminal(width)), METRICS)[-2:]
    shown, whole = "   ".join(lines), "   ".join(SHOWN)
    assert whole.startswith(f"{shown}   ")


def test_numbers_stay_until_there_are_new_ones_and_counts_of_zero_are_left_out():
    display = make_display(1000, console=terminal(140))
    display.log({"step": 1, "loss": 3.0, "val_bpb": 1.5, "skipped": 0, "tokens": 0})
    lines = log(display, {"step": 2, "loss": math.nan, "lr": None})
    assert lines[1:] == ["loss nan   val bpb 1.5000"]


def test_evaluations_and_prints_stand_above_the_bar():
    text = "\n".join(plain(show(terminal(80))))
    assert "a [bold] word" in text and "1234" in text
    assert "step  120   val loss 2.5000   val bpb 1.7500   loss 2.3457" in text


def test_before_the_first_step_no_time_left_is_made_up():
    console = Console(file=io.StringIO(), width=200)
    with make_display(10, console=console) as display:
        display.log({"step": 0, "val_loss": 1.0})
    line = console.file.getvalue()
    assert line == "step  0/10 | elapsed 0:00:00 | eta -:--:-- | val loss 1.0000\n"


def test_a_finished_run_has_no_time_left():
    display = make_display(120, console=terminal(80))
    bar = log(display, METRICS)[0]
    assert "100% elapsed" in bar and "eta" not in bar


def test_a_bar_that_stopped_on_its_way_is_erased_and_a_whole_one_stays():
    for steps, stays in ((60, False), (120, True)):
        console = terminal(80)
        with make_display(120, console=console) as display:
            display.update(steps)
        after = console.file.getvalue().rpartition("/120")[2]
        assert ("\x1b[2K" in after) != stays


def test_what_takes_a_while_is_said_on_a_terminal_and_elsewhere():
    for console in (terminal(80), Console(file=io.StringIO(), width=40)):
        with busy(console, "Compiling the training step"):
            pass
        assert "Compiling the training step" in console.file.getvalue()


LOSSES = [
    {"step": 0, "val_loss": 99.0},  # of untrained parameters
    *({"step": step, "loss": 5.5 - step / 50} for step in range(10, 100, 10)),
    {"step": 5, "val_loss": 5.4},
    {"step": 100, "loss": 3.5, "val_loss": 3.6},
]


@pytest.mark.parametrize("width", [40, 80, 140])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_chart_falls_from_the_first_to_the_last_loss(width, ascii_only):
    title, *rows, axis, steps = chart.draw_losses(
        LOSSES, width, ascii_only=ascii_only
    ).splitlines()
    assert max(map(len, (title, *rows, axis, steps))) <= width
    assert (title + "".join(rows) + axis).isascii() == ascii_only
    assert rows[0].startswith("5.40") and rows[-1].startswith("3.50")
    assert steps.split() == ["0", "step", "100"]
    point = "o" if ascii_only else "●"
    found = [row.find(point) for row in rows if point in row]
    assert len(found) == 2 and found[0] < width / 4 and found[1] == len(axis) - 1
    # Further right a falling line is never further up.
    drawn = [row[6:].rstrip() for row in rows]
    assert [*map(len, drawn)] == sorted(map(len, drawn))


def test_a_chart_needs_two_losses():
    assert chart.draw_losses([{"step": 9, "val_loss": 5.0, "loss": None}], 80) == ""


@pytest.mark.parametrize("ascii_only", [True, False])
def test_bars_are_as_long_as_their_bytes(ascii_only):
    sizes = {"a": 1_000_000, "half": 8_000_000, "whole": 16_000_000}
    lines = chart.draw_bytes(sizes, 80, ascii_only=ascii_only).splitlines()[1:]
    a, half, whole = (line.split()[1] for line in lines)
    assert abs(len(whole) - 2 * len(half)) <= 1 and 3 <= len(a) <= 5
    assert lines[-1].endswith(" 16.00 MB") and max(map(len, lines)) <= 80
    assert "".join(lines).isascii() == ascii_only
