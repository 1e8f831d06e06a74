"""Charts of a run as text: its losses as a line, its bytes as bars."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

_ROWS = 10
_EIGHTHS = " ▏▎▍▌▋▊▉█"


class _Marks(NamedTuple):
    """Characters of a chart; a cell has `dots` points, down and across."""

    dots: tuple[int, int]
    point: str
    corner: str
    across: str
    down: str


_UNICODE = _Marks((4, 2), "●", "└", "─", "│")
_ASCII = _Marks((1, 1), "o", "+", "-", "|")
# Bits of the dots of a Braille character, U+2800 and on, down and across.
_BRAILLE = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


def draw_losses(
    lines: Sequence[Mapping[str, Any]], width: int, *, ascii_only: bool = False
) -> str:
    """Draws the losses of a run by step: training as a line, validation as points.

    That before the first step is left out: half of the chart would be the way from it.

    Args:
      lines: Metrics, from `read_metrics`.
      width: Columns of the chart.
      ascii_only: Whether to do without Braille and box characters.

    Returns:
      The chart; nothing if there are fewer than two losses.
    """
    lines = [line for line in lines if line["step"] > 0]
    trained, evaluated = _points(lines, "loss"), _points(lines, "val_loss")
    known = [*trained, *evaluated]
    if len(known) < 2:
        return ""
    marks = _ASCII if ascii_only else _UNICODE
    steps, losses = zip(*known, strict=True)
    low, high = min(losses), max(losses)
    labels = [f"{loss:.2f}" for loss in np.linspace(high, low, _ROWS)]
    margin = max(map(len, labels))
    columns = width - margin - 2
    place = _Scale(max(steps), low, high, columns, marks.dots)
    cells = _cells(_line(trained, place), marks)
    for step, loss in evaluated:
        row, column = place(step, loss)
        cells[row // marks.dots[0]][column // marks.dots[1]] = marks.point
    shown = {0, _ROWS // 2, _ROWS - 1}
    rows = [
        f"{labels[i] if i in shown else '':>{margin}} {marks.down}{''.join(row)}"
        for i, row in enumerate(cells)
    ]
    last = f"step {max(steps)}"
    return "\n".join(
        [
            f"Loss: line training, {marks.point} held-out text",
            *(row.rstrip() for row in rows),
            f"{'':>{margin}} {marks.corner}{marks.across * columns}",
            f"{'':>{margin}}  0{last:>{columns - 1}}",
        ]
    )


def draw_bytes(
    sizes: Mapping[str, int], width: int, *, ascii_only: bool = False
) -> str:
    """Draws sizes as bars, each with its number of MB, 10⁶ bytes.

    Args:
      sizes: Bytes by name.
      width: Columns of the chart.
      ascii_only: Whether to do without block characters.
    """
    numbers = {name: f"{size / 1e6:.2f} MB" for name, size in sizes.items()}
    margin, behind = max(map(len, sizes)), max(map(len, numbers.values()))
    longest = width - margin - behind - 4
    eighths = {
        name: round(8 * longest * size / max(sizes.values()))
        for name, size in sizes.items()
    }
    lines = (
        f"  {name:<{margin}} {_bar(eighths[name], ascii_only)} {numbers[name]}"
        for name in sizes
    )
    return "\n".join(["Optimizer state", *lines])


class _Scale(NamedTuple):
    """From steps and losses to dots, counted down and across."""

    last: int
    low: float
    high: float
    columns: int
    dots: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return _ROWS * self.dots[0], self.columns * self.dots[1]

    def __call__(self, step: float, loss: float) -> tuple[int, int]:
        down, across = (size - 1 for size in self.shape)
        height = (self.high - loss) / max(self.high - self.low, 1e-9)
        return round(down * height), round(across * step / max(self.last, 1))


def _line(
    points: Sequence[tuple[int, float]], place: _Scale
) -> Bool[np.ndarray, "down across"]:
    """Returns the dots of a line through points."""
    dots = np.zeros(place.shape, bool)
    if not points:
        return dots
    steps, losses = zip(*points, strict=True)
    first, last = (place(step, 0.0)[1] for step in (steps[0], steps[-1]))
    before = None
    for column in range(first, last + 1):
        step = column * place.last / max(place.shape[1] - 1, 1)
        row = place(step, float(np.interp(step, steps, losses)))[0]
        above, below = sorted((row, row if before is None else before))
        dots[above : below + 1, column] = True
        before = row
    return dots


def _cells(dots: Bool[np.ndarray, "down across"], marks: _Marks) -> list[list[str]]:
    """Returns the characters of a grid of dots."""
    down, across = marks.dots
    parts = dots.reshape(_ROWS, down, -1, across).transpose(0, 2, 1, 3)
    if marks is _ASCII:
        return [["*" if cell else " " for cell in row] for row in parts[..., 0, 0]]
    codes = (parts * _BRAILLE).sum((-1, -2))
    return [[chr(0x2800 + code) if code else " " for code in row] for row in codes]


def _bar(eighths: int, ascii_only: bool) -> str:
    whole, rest = divmod(max(eighths, 1), 8)
    if ascii_only:
        return "#" * (whole + (rest > 3) or 1)
    return "█" * whole + _EIGHTHS[rest].strip()


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(x["step"], x[key]) for x in lines if x.get(key) is not None]
