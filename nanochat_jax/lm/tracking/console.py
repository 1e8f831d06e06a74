"""Display of a run while it trains: a progress bar on a terminal, lines elsewhere.

Metrics have the names of `metrics.jsonl`. Their values should be on the host already:
formatting a device array waits for the device.
"""

import abc
import contextlib
import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
)
from rich.table import Column
from rich.text import Text

# In the order of the display; where there is no room for all, the last are left out.
# Numbers are padded to the same width in every line.
_TEXTS: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.4f}".format,
    "val_loss": "val loss {:.4f}".format,
    "val_bpb": "val bpb {:.4f}".format,
    "skipped": "skipped {:.0f}".format,
    "tokens_per_s": lambda rate: f"{short(rate):>6} tok/s",
    "lr": "lr {:.2e}".format,
    "grad_norm": "grad norm {:5.3g}".format,
    "optimizer_share": "optimizer {:3.0%}".format,
    "mfu": "MFU {:5.1%}".format,
    "memory_bytes": lambda count: f"{count / 1e9:.2f} GB in use",
    "tokens": lambda count: f"{short(count):>6} tokens",
}
_EVALUATED = ("val_loss", "val_bpb")
_COUNTS = ("skipped", "tokens")
_GAP = "   "


class Display(abc.ABC):
    """Display of progress and metrics; a context manager."""

    def __init__(self, progress: Progress):
        """Shows the only task of `progress`, which also measures the time.

        Args:
          progress: Bar with one task.
        """
        self._progress = progress
        self._task = progress.tasks[0]

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        # A bar that stopped on its way would stand above what is said of that.
        self._progress.live.transient = not self._progress.finished
        self._progress.stop()

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Sets the number of steps done; cheap enough for every step.

        Args:
          step: Steps of the run that are done.
          metrics: New values of metrics, if any.
        """
        shown = {**self.latest, **(metrics or {})}
        self._progress.update(self._task.id, completed=step, metrics=shown)

    @property
    def latest(self) -> Mapping[str, Any]:
        """The last value of each metric."""
        return self._task.fields["metrics"]

    @abc.abstractmethod
    def log(self, metrics: Mapping[str, Any]) -> None:
        """Shows the metrics of a log interval.

        Args:
          metrics: Values by name, `step` among them.
        """

    def print(self, message: RenderableType) -> None:
        """Prints a text unchanged, or a table, above the bar if there is one."""
        self._progress.console.print(
            message, markup=False, highlight=False, soft_wrap=True
        )


class _Lines(Display):
    """Prints a line at each log interval."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        self.update(metrics["step"], metrics)
        total = f"{self._task.total:.0f}"
        parts = [
            f"step {metrics['step']:>{len(total)}}/{total}",
            *_texts(metrics, [name for name in _TEXTS if name not in _EVALUATED]),
            f"elapsed {clock(metrics.get('elapsed_s') or self._task.elapsed)}",
            f"eta {clock(self._task.time_remaining)}",
            *_texts(metrics, _EVALUATED),
        ]
        self.print(" | ".join(parts))


class _Bar(Display):
    """Shows the latest metrics below a bar; evaluations add a line above it."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        self.update(metrics["step"], metrics)
        evaluated = _texts(metrics, _EVALUATED)
        if evaluated:
            step = f"step {metrics['step']:>{len(f'{self._task.total:.0f}')}}"
            loss = _texts(self.latest, ["loss"])
            self.print(_styled(_GAP.join([step, *evaluated, *loss])))


class _Panel(Progress):
    """A bar with the metrics below it."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yields the bar, and the metrics if there are any."""
        yield from super().get_renderables()
        if self.tasks and self.tasks[0].fields["metrics"]:
            yield _Metrics(self.tasks[0].fields["metrics"])


class _Metrics:
    """As many of the metrics as fit on two lines."""

    def __init__(self, metrics: Mapping[str, Any]):
        # The line above the bar has the loss of the last evaluation.
        texts = _texts(metrics, [name for name in _TEXTS if name != "val_loss"])
        self._texts = [" ".join(text.split()) for text in texts]

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterable[RenderableType]:
        lines = [""]
        for text in self._texts:
            longer = f"{lines[-1]}{_GAP}{text}" if lines[-1] else text
            if len(longer) <= options.max_width or not lines[-1]:
                lines[-1] = longer
            else:
                lines.append(text)
        yield from map(_styled, lines[:2])


class _TimeColumn(ProgressColumn):
    """Elapsed and remaining time."""

    def render(self, task: Task) -> Text:
        left = "" if task.finished else f" eta {clock(task.time_remaining)}"
        return Text(f"elapsed {clock(task.elapsed)}{left}", style="dim")


def make_display(
    total_steps: int, *, start_step: int = 0, console: Console | None = None
) -> Display:
    """Returns a progress display if the console is a terminal, otherwise plain lines.

    Args:
      total_steps: Steps of the run, including those before a resumption.
      start_step: Steps done before a resumption.
      console: Console to write to; standard output if not given.
    """
    console = console or Console()
    on_terminal = console.is_terminal and not console.is_dumb_terminal
    progress = _Panel(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        _TimeColumn(Column(no_wrap=True)),
        console=console,
        expand=True,
        disable=not on_terminal,
        speed_estimate_period=600,  # seconds; steps may be slow
    )
    progress.add_task("", total=total_steps, completed=start_step, metrics={})
    return _Bar(progress) if on_terminal else _Lines(progress)


@contextlib.contextmanager
def busy(console: Console, task: str) -> Iterator[None]:
    """Says what takes a while: on a terminal as long as it does, elsewhere in a line.

    Args:
      console: Console to write to.
      task: What is done, such as "Compiling the training step".
    """
    if not console.is_terminal or console.is_dumb_terminal:
        console.print(task, markup=False, highlight=False, soft_wrap=True)
        yield
        return
    with console.status(task):
        yield


def _texts(metrics: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Returns the texts of the metrics that have a value, without counts of 0."""
    known = [name for name in names if metrics.get(name) is not None]
    shown = [name for name in known if name not in _COUNTS or metrics[name]]
    return [_TEXTS[name](float(metrics[name])) for name in shown]


def _styled(line: str) -> Text:
    """Returns a line with bold numbers and dim names."""
    text = Text(line, style="dim", no_wrap=True)
    text.highlight_regex(r"(?<!\S)(nan|[-+]?(inf|\d\S*))(?= |$)", "not dim bold")
    return text


def short(count: float) -> str:
    """Returns a number with at most four digits and a decimal prefix, like `12.3k`."""
    for prefix in ("", "k", "M", "G"):
        if abs(count) < 999.95:
            return f"{count:.0f}" if not prefix else f"{count:.1f}{prefix}"
        count /= 1000
    return f"{count:.1f}T"


def clock(seconds: float | None) -> str:
    """Returns hours, minutes and seconds; dashes for an unknown time."""
    if seconds is None:
        return "-:--:--"
    return str(datetime.timedelta(seconds=round(seconds)))
