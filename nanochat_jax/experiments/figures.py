"""Figures of training runs, drawn with matplotlib (extra `plot`)."""

import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nanochat_jax.experiments import labels
from nanochat_jax.lm.planning import BASELINE
from nanochat_jax.lm.runtime import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Axis = Literal["step", "tokens", "seconds"]
Curve = Sequence[Mapping[str, Any]]
Summary = Mapping[str, Mapping[str, Any]]

COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
"""Colors that the colour-blind tell apart (Okabe and Ito 2008), without yellow."""

_MARKERS = "os^Dv*P"
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
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

    figure, (axes,) = _figure(_TITLES[x])
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"Loss by {_TITLES[x]}: markers held-out text, thin lines training")
    if x == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 2M, not 2.0 and 1e6
    ends = {}
    for name, style in zip(runs, _styles(), strict=False):
        axes.plot(*losses[name], color=style["color"], alpha=0.4, linewidth=0.8)
        axes.plot(*evaluated[name], markevery=_every(evaluated[name]), **style)
        ends[name] = _end(
            evaluated[name] if evaluated[name][0] else losses[name], style
        )
    known = [points for points in evaluated.values() if len(points[0]) > 2]
    _after_the_fall(axes, known or [*losses.values(), *evaluated.values()], room=0.4)
    labels.label_ends(axes, ends)
    return figure


def draw_loss_by_step(variants: Summary) -> "Figure":
    """Draws validation loss by step, and below it over that of float32 Muon.

    Lines are means over seeds, and bands their range.

    Args:
      variants: Numbers by variant, from `results.summarize`.
    """
    whole, lost = _without_lost(variants)
    curves = {name: _validation(x["losses"]) for name, x in whole.items()}
    compared = BASELINE in whole and len(whole) > 1
    figure, panels = _figure("step", rows=2 if compared else 1)
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].set_title(f"Held-out loss of optimizer variants{_of(variants)}{lost}")
    _draw_curves(panels[0], curves)
    if compared:
        panels[1].set_ylabel("loss over float32 Muon's")
        _draw_curves(panels[1], _ratios(curves))
    return figure


def draw_loss_by_bytes(variants: Summary) -> "Figure":
    """Draws the last validation loss by the bytes of the optimizer state.

    Args:
      variants: Numbers by variant, from `results.summarize`.
    """
    whole, lost = _without_lost(variants)
    figure, (axes,) = _figure("optimizer state (MB)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"Last held-out loss by optimizer state{_of(variants)}{lost}")
    points = {}
    for (name, values), style in zip(whole.items(), _styles(), strict=False):
        size, loss = values["total_state_bytes"] / 1e6, values["val_loss"]
        error = values["val_loss_std"] or 0.0
        axes.errorbar([size], [loss], yerr=[error], capsize=3, **style)
        points[name] = labels.Named(size, loss, style["color"])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(0.15)
    labels.label_points(axes, points)
    return figure


def save(figure: "Figure", path: Path, dpi: int = 150) -> None:
    """Writes a figure as PNG, in one piece.

    Args:
      figure: Figure to write.
      path: File to write; its folder is made.
      dpi: Pixels by inch.
    """
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def _figure(x: str, rows: int = 1) -> tuple["Figure", list["Axes"]]:
    """Returns a figure and its panels, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2 + 3 * rows), layout="constrained")
    panels = figure.subplots(rows, sharex=True, squeeze=False)[:, 0].tolist()
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[-1].set_xlabel(x)
    return figure, panels


def _styles() -> Iterator[dict[str, Any]]:
    """Yields styles of lines that differ in color, marker and dashes."""
    for i in itertools.count():
        yield {
            "color": COLORS[i % len(COLORS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _DASHES[i % len(_DASHES)],
            "markersize": 5,
        }


def _draw_curves(axes: "Axes", curves: Mapping[str, tuple[Any, Any]]) -> None:
    """Draws means and ranges over seeds, with the names at their ends."""
    ends = {}
    for (name, (steps, losses)), style in zip(curves.items(), _styles(), strict=False):
        mean = losses.mean(0)
        axes.plot(steps, mean, markevery=_every((steps, mean)), **style)
        if len(losses) > 1:
            band = losses.min(0), losses.max(0)
            axes.fill_between(steps, *band, color=style["color"], alpha=0.15)
        ends[name] = _end((steps, mean), style)
    _after_the_fall(axes, [(steps, x.mean(0)) for steps, x in curves.values()])
    labels.label_ends(axes, ends)


def _ratios(curves: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """Returns losses over those of the baseline at the same step and seed."""
    steps, base = curves[BASELINE]
    common = [s for s in steps if all(s in other for other, _ in curves.values())]
    at = lambda own, losses: losses[: len(base), [own.index(s) for s in common]]
    return {
        name: (common, at(own, losses) / at(steps, base)[: len(losses)])
        for name, (own, losses) in curves.items()
    }


def _every(points: tuple[Any, Any]) -> int:
    """Returns how many points of a line there are to a marker."""
    return max(1, len(points[0]) // 12)


def _after_the_fall(
    axes: "Axes", curves: Iterable[tuple[Any, Any]], room: float = 0.05
) -> None:
    """Fits the vertical axis to the losses after a fifth of each run.

    Those of the first steps are so large that no two runs could be told apart.

    Args:
      axes: Axes with the curves.
      curves: Places and losses of the curves.
      room: Room above and below, as a fraction of the range.
    """
    known = [(np.asarray(x), np.asarray(y, float)) for x, y in curves if len(x)]
    if not known:
        return
    late = [y[(x >= x[-1] / 5) & np.isfinite(y)] for x, y in known]
    shown = np.concatenate(late)
    if shown.size and np.ptp(shown):
        around = room * np.ptp(shown)
        axes.set_ylim(shown.min() - around, shown.max() + around)


def _end(points: tuple[Any, Any], style: Mapping[str, Any]) -> labels.Named:
    x, y = points
    return labels.Named(float(x[-1]), float(y[-1]), style["color"])


def _without_lost(variants: Summary) -> tuple[Summary, str]:
    """Returns the variants with a last loss, and the names of the others in words."""
    whole = {name: x for name, x in variants.items() if x["val_loss"] is not None}
    lost = [name for name in variants if name not in whole]
    return whole, f"\ndiverged: {', '.join(lost)}" if lost else ""


def _of(variants: Summary) -> str:
    """Returns the number of seeds in words."""
    seeds = max(len(values["seeds"]) for values in variants.values())
    return ", one seed" if seeds == 1 else f", mean of {seeds} seeds"


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
