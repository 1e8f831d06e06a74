"""How the pictures look: colours for the colour-blind, and labels beside the lines."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent

# Okabe and Ito (2008), "Color universal design".
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
MARKERS = "osD^v<>P"


def panels(count: int, width: float = 4.6, height: float = 3.6) -> tuple[Figure, list]:
    """Makes a figure with axes side by side.

    Args:
      count: Number of axes.
      width: Inches of each.
      height: Inches of all.
    """
    figure = Figure(figsize=(count * width, height), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for each in axes:
        each.grid(alpha=0.25, linewidth=0.6)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def label(
    axes: Axes, text: str, x: float, y: float, color: str, shift=(6, 0), align="left"
) -> None:
    """Writes the name of a line beside a point of it.

    Args:
      axes: Axes of the line.
      text: Its name.
      x: Place of the point.
      y: Height of the point.
      color: Colour of the line.
      shift: Points to move the text by.
      align: Side of the text that is at the point.
    """
    axes.annotate(
        text, (x, y), shift, textcoords="offset points", color=color, ha=align,
        va="center", fontsize=9, fontweight="bold",
    )  # fmt: skip


def label_ends(axes: Axes, ends: dict[str, tuple[float, float, str]]) -> None:
    """Writes the names of lines at their ends, moved apart where they would touch.

    Args:
      axes: Axes of the lines, with their limits set.
      ends: Place, height and colour of each end, by the name of the line.
    """
    points = 72 / axes.figure.dpi
    height = lambda x, y: axes.transData.transform((x, y))[1] * points
    axes.figure.draw_without_rendering()
    lowest = -float("inf")
    for name, (x, y, color) in sorted(ends.items(), key=lambda item: item[1][1]):
        lowest = max(height(x, y), lowest + 11)
        label(axes, name, x, y, color, (8, lowest - height(x, y)))


def save(figure: Figure, name: str, folder: Path = FOLDER) -> None:
    """Writes a figure as SVG, the same bytes each time.

    Args:
      figure: Figure to write.
      name: Name of the file, without its ending.
      folder: Folder to write to.
    """
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
