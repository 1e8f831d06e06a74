"""Figures of training runs, drawn with matplotlib (extra `plot`)."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nanochat_jax.lm.runtime import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Axis = Literal["step", "tokens", "seconds"]
Curve = Sequence[Mapping[str, Any]]
Summary = Mapping[str, Mapping[str, Any]]

_TITLES = {"step": "step", "tokens": "tokens", "seconds": "seconds of training"}


def require_matplotlib() -> None:
    """Checks that matplotlib is installed.

    Raises:
      ValueError: If it is not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "figures are drawn with matplotlib, which is not installed. Install "
            "`nanochat-jax[plot]`."
        )


def draw_runs(runs: Mapping[str, Curve], x: Axis) -> "Figure":
    """Draws training runs together: the loss as a line, validation as points.

    Args:
      runs: Lines of metrics by name of the run.
      x: Quantity on the horizontal axis.

    Raises:
      ValueError: If runs have no loss, or no such quantity.
    """
    losses = {name: _points(lines, x, "loss") for name, lines in runs.items()}
    evaluated = {name: _points(lines, x, "val_loss") for name, lines in runs.items()}
    empty = [name for name in runs if not (losses[name][0] or evaluated[name][0])]
    if empty:
        raise ValueError(
            f"these runs have no losses by {x}: {empty}. Draw them by step, or leave "
            "them out."
        )
    from matplotlib.ticker import EngFormatter

    figure, axes = _figure(_TITLES[x], "loss (nats per token)")
    if x == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 2M, not 2.0 and 1e6
    for name in runs:
        (line,) = axes.plot(*losses[name], alpha=0.4, linewidth=1)
        style = {"marker": "o", "markersize": 4, "color": line.get_color()}
        axes.plot(*evaluated[name], **style, label=name)
    axes.legend(title="thin: training, points: validation", frameon=False)
    return figure


def draw_loss_by_step(variants: Summary) -> "Figure":
    """Draws validation loss by step: the mean over seeds, and their range.

    Args:
      variants: Numbers by variant, from `results.summarize`.
    """
    figure, axes = _figure("step", "validation loss (nats per token)")
    for name, values in variants.items():
        steps, losses = _validation(values["losses"])
        (line,) = axes.plot(steps, losses.mean(0), marker=".", label=name)
        if len(losses) > 1:
            band = losses.min(0), losses.max(0)
            axes.fill_between(steps, *band, color=line.get_color(), alpha=0.2)
    axes.legend()
    return figure


def draw_loss_by_bytes(variants: Summary) -> "Figure":
    """Draws the last validation loss by the bytes of the optimizer state.

    Args:
      variants: Numbers by variant, from `results.summarize`.
    """
    figure, axes = _figure("optimizer state (MB)", "validation loss (nats per token)")
    for name, values in variants.items():
        # A diverged run has no loss, but keeps its place in the legend.
        loss = math.nan if values["val_loss"] is None else values["val_loss"]
        size, error = values["total_state_bytes"] / 1e6, values["val_loss_std"] or 0.0
        axes.errorbar([size], [loss], yerr=[error], marker="o", capsize=3, label=name)
    axes.set_xlim(left=0)
    axes.legend()
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG, in one piece.

    Args:
      figure: Figure to write.
      path: File to write; its folder is made.
    """
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _figure(x: str, y: str) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _validation(curves: Sequence[Curve]) -> tuple[Any, Any]:
    """Returns the steps with a validation loss, and the losses, `[seeds, steps]`."""
    lines = [
        {c["step"]: c["val_loss"] for c in curve if "val_loss" in c} for curve in curves
    ]
    steps = sorted(set.intersection(*(set(line) for line in lines)))
    losses = [[line[step] for step in steps] for line in lines]
    return steps, np.array(losses, float)  # `None`, of a lost run, becomes NaN


def _points(lines: Curve, x: Axis, y: str) -> tuple[list[float], list[float]]:
    """Returns the points whose place and value are both known."""
    places = zip(_places(lines, x), lines, strict=True)
    points = [
        (place, line[y])
        for place, line in places
        if place is not None and line.get(y) is not None
    ]
    return [place for place, _ in points], [value for _, value in points]


def _places(lines: Curve, x: Axis) -> list[float | None]:
    """Returns the place of each line on an axis; `None` if it is not known."""
    if x != "seconds":
        return [line.get(x) for line in lines]
    places, before, last = [], 0.0, 0.0
    for line in lines:
        elapsed = line.get("elapsed_s", None if line["step"] else 0.0)
        if elapsed is not None:
            # A resumed run counts its seconds from the resumption.
            before += last if elapsed < last else 0.0
            last = elapsed
        places.append(None if elapsed is None else before + elapsed)
    return places
