"""What a run shows while it trains: a progress bar on a terminal, lines elsewhere.

Both take metrics by the names they have in `metrics.jsonl`. The numbers should be on
the host already: turning a device array into text waits for the device.
"""

import abc
import datetime
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

_TEXTS: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.4f}".format,
    "lr": "lr {:.2e}".format,
    "grad_norm": "grad norm {:.3g}".format,
    "tokens_per_s": lambda rate: f"{rate / 1000:.1f}k tok/s",
    "val_loss": "val loss {:.4f}".format,
    "val_bpb": "bpb {:.4f}".format,
}


class Display(abc.ABC):
    """What the trainer writes to; a context manager."""

    def __init__(self, progress: Progress):
        """Shows the one task of `progress`, which also keeps the time."""
        self._progress = progress
        self._task = progress.tasks[0]

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Says that `step` steps are done; cheap enough for every step.

        Args:
          step: Steps of the whole run that are done.
          metrics: New values of metrics to show, if any.
        """
        shown = {**self._task.fields["metrics"], **(metrics or {})}
        self._progress.update(self._task.id, completed=step, metrics=shown)

    @abc.abstractmethod
    def log(self, metrics: Mapping[str, Any]) -> None:
        """Shows the metrics of a log interval.

        Args:
          metrics: Values by name. `step` must be there; the others are shown if they
            are.
        """

    def print(self, message: RenderableType) -> None:
        """Prints a text as it is, or a table, above the bar if there is one."""
        self._progress.console.print(
            message, markup=False, highlight=False, soft_wrap=True
        )


class _Lines(Display):
    """Prints a line at each log interval."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        self.update(metrics["step"])
        total = f"{self._task.total:.0f}"
        parts = [
            f"step {metrics['step']:>{len(total)}}/{total}",
            *_texts(metrics, _TEXTS),
            f"elapsed {_clock(metrics.get('elapsed_s') or self._task.elapsed)}",
            f"eta {_clock(self._task.time_remaining)}",
        ]
        self.print(" | ".join(parts))


class _Bar(Display):
    """Keeps the latest metrics beside a bar; evaluations leave a line above it."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        self.update(metrics["step"], metrics)
        evaluated = _texts(metrics, ("val_loss", "val_bpb"))
        if evaluated:
            self.print(" | ".join([f"step {metrics['step']}", *evaluated]))


class _MetricsColumn(ProgressColumn):
    """The loss, the bits per byte of the last evaluation, and the speed."""

    def render(self, task: Task) -> Text:
        shown = ("loss", "val_bpb", "tokens_per_s")
        return Text("  ".join(_texts(task.fields["metrics"], shown)))


def make_display(
    total_steps: int, *, start_step: int = 0, console: Console | None = None
) -> Display:
    """Returns a progress bar if the console is a terminal, otherwise plain lines.

    Args:
      total_steps: Steps of the whole run, including those before a resumption.
      start_step: Steps done before this run.
      console: Where to write; standard output if not given.

    Returns:
      The display, to be used as a context manager.
    """
    console = console or Console()
    on_terminal = console.is_terminal and not console.is_dumb_terminal
    progress = Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        _MetricsColumn(Column(no_wrap=True)),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
        disable=not on_terminal,
        speed_estimate_period=600,  # seconds; steps may be slow
    )
    progress.add_task("", total=total_steps, completed=start_step, metrics={})
    return _Bar(progress) if on_terminal else _Lines(progress)


def _texts(metrics: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Returns the texts of those metrics that have a value."""
    known = [name for name in names if metrics.get(name) is not None]
    return [_TEXTS[name](float(metrics[name])) for name in known]


def _clock(seconds: float | None) -> str:
    """Returns hours, minutes and seconds."""
    if seconds is None:
        return "-:--:--"
    return str(datetime.timedelta(seconds=round(seconds)))
