"""`nanochat-jax plot`: the metrics of runs, drawn together."""

import collections
import dataclasses
from pathlib import Path
from typing import Annotated

from nanochat_jax.commands.shared import usage_errors
from nanochat_jax.commands.usage import POSITIONAL
from nanochat_jax.config import schema
from nanochat_jax.experiments import figures
from nanochat_jax.lm.runtime import require_writable
from nanochat_jax.lm.tracking import read_metrics


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draws the losses of runs in one figure.

    Attributes:
      runs: Folders of runs, or their files of metrics.
      output: PNG file to write.
      x: Horizontal axis; seconds are those of training, without compilation.
    """

    runs: Annotated[tuple[str, ...], POSITIONAL]
    output: str = "loss.png"
    x: figures.Axis = "step"

    def run(self) -> None:
        """Draws the figure and prints its path."""
        with usage_errors():
            figures.require_matplotlib()
            schema.require(
                (
                    self.output.endswith(".png"),
                    f"`--output` must end in .png, got {self.output}.",
                ),
            )
            require_writable(files=[self.output])
            figure = figures.draw_runs(_read(self.runs), self.x)
            figures.save(figure, Path(self.output))
        print(f"Wrote {self.output}")


def _read(runs: tuple[str, ...]) -> dict[str, figures.Curve]:
    """Returns the lines of each run by its name, or refuses all unreadable ones."""
    curves, errors = {}, []
    for name, path in _files(runs).items():
        try:
            curves[name] = read_metrics(path)
        except ValueError as error:
            errors.append((False, str(error)))
            continue
        errors.append((bool(curves[name]), f"{path}: there are no metrics in it yet."))
    schema.require(*errors)
    return curves


def _files(runs: tuple[str, ...]) -> dict[str, Path]:
    """Returns the file of each run by name, or by path where names repeat."""
    files = {}
    for run in dict.fromkeys(runs):
        path = Path(run)
        files[run] = path if path.suffix == ".jsonl" else path / "metrics.jsonl"
    names = {run: _name(path) for run, path in files.items()}
    counts = collections.Counter(names.values())
    return {
        run if counts[name] > 1 else name: files[run] for run, name in names.items()
    }


def _name(path: Path) -> str:
    """Returns the name of a run: of its folder, or of a file other than `metrics`."""
    path = path.absolute()
    return path.parent.name if path.name == "metrics.jsonl" else path.stem
