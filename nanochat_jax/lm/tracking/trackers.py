"""Sinks of metrics: TensorBoard and Weights & Biases.

`jsonl.MetricsWriter` is a sink too, and every run has it. These need a package each
(extras `tensorboard` and `wandb`), imported when the sink is made. Metrics have the
names of `metrics.jsonl` everywhere.
"""

import dataclasses
import importlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from nanochat_jax.lm.runtime import write_text
from nanochat_jax.lm.tracking.jsonl import MetricsWriter, numbers


class Sink(Protocol):
    """Takes the metrics of a run, step after step."""

    def resume(self, step: int) -> None:
        """Prepares for a run that goes on after `step`; -1 for one that begins.

        To be called before anything is written, so that later steps that were written
        already do not appear twice. Without it the sink goes on where it stopped.
        """
        ...

    def write(self, values: Mapping[str, Any]) -> None:
        """Writes numbers, or arrays of one number, by name; `step` is among them."""
        ...

    def close(self) -> None:
        """Writes out buffered metrics."""
        ...


class TensorBoardSink:
    """Writes event files for TensorBoard.

    Event files cannot be shortened. So a resumed run starts a new file with a mark,
    from whose step on TensorBoard hides the values of older files.
    """

    def __init__(self, directory: str | Path):
        """Stores the folder, which the first `write` makes.

        Args:
          directory: Folder of the run's event files.

        Raises:
          ValueError: If tensorboardX is not installed.
        """
        self._package = _load("tensorboardX", extra="tensorboard")
        self._directory = Path(directory)
        self._first: int | None = None
        self._writer: Any = None

    def resume(self, step: int) -> None:
        """Makes TensorBoard hide values after `step`."""
        self._first = step + 1

    def write(self, values: Mapping[str, Any]) -> None:
        """Writes a scalar for each number."""
        if self._writer is None:
            self._writer = self._package.SummaryWriter(
                str(self._directory),
                purge_step=self._first,
                # Names have whole seconds only, and equal names overwrite each other.
                filename_suffix=f".{time.time_ns()}",
            )
        scalars = numbers(values)
        step = scalars.pop("step")
        for name, number in scalars.items():
            self._writer.add_scalar(name, number, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbSink:
    """Logs to Weights & Biases, without the network unless the user asks for it.

    The run is stored on this machine, for `wandb sync` to upload. With the environment
    variable `WANDB_MODE=online` it is uploaded while it trains.

    Logged values cannot be removed. So the folder has a file with the id of the run and
    its last logged step, and a resumed run logs later steps only; the numbers of the
    others are the same.
    """

    def __init__(self, project: str, config: Mapping[str, Any], directory: str | Path):
        """Stores the arguments; the first `write` starts the run.

        Args:
          project: Project of the run.
          config: Settings to show with it.
          directory: Folder for its files.

        Raises:
          ValueError: If wandb is not installed.
        """
        self._package = _load("wandb", extra="wandb")
        self._project, self._config = project, dict(config)
        self._directory = Path(directory)
        self._file = self._directory / "wandb-run.json"
        self._run: Any = None
        self._logged = -1

    def resume(self, step: int) -> None:
        """Goes on with the run of the folder, or starts another if `step` is -1."""
        if step < 0:
            self._file.unlink(missing_ok=True)

    def write(self, values: Mapping[str, Any]) -> None:
        """Logs the numbers, unless their step was logged before."""
        if self._run is None:
            self._run = self._begin()
        logged = numbers(values)
        step = int(logged.pop("step"))
        if step > self._logged:
            self._run.log(logged, step=step)
            self._logged = step
            self._remember()

    def close(self) -> None:
        """Ends the run, or this part of a resumed run."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _begin(self) -> Any:
        """Starts a run, or goes on with the run of the folder."""
        self._directory.mkdir(parents=True, exist_ok=True)
        name = secrets.token_hex(4)
        if self._file.exists():
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            name, self._logged = stored["id"], stored["step"]
        mode = os.environ.get("WANDB_MODE", "offline")
        return self._package.init(
            project=self._project,
            config=self._config,
            dir=str(self._directory),
            id=name,
            mode=mode,
            # Offline there is nothing to look the run up in.
            resume="allow" if mode == "online" else None,
            # Else it takes the terminal from the progress display.
            settings=self._package.Settings(console="off"),
        )

    def _remember(self) -> None:
        text = json.dumps({"id": self._run.id, "step": self._logged})
        write_text(self._file, text + "\n")


def make_sinks(
    folder: Path | None, config: Any, *, tensorboard: bool, wandb: str | None
) -> list[Sink]:
    """Returns the sinks of a run: its metrics file, and the trackers asked for.

    Args:
      folder: Folder of the run; without one there are no sinks.
      config: Dataclass of its settings.
      tensorboard: Whether to write event files, to the folder `tensorboard` in it.
      wandb: Project of Weights & Biases to log to, if any.

    Raises:
      ValueError: If the package of a tracker is not installed.
    """
    if folder is None:
        return []
    sinks: list[Sink] = [MetricsWriter(folder / "metrics.jsonl")]
    if tensorboard:
        sinks.append(TensorBoardSink(folder / "tensorboard"))
    if wandb:
        sinks.append(WandbSink(wandb, dataclasses.asdict(config), folder))
    return sinks


def _load(package: str, extra: str) -> Any:
    """Imports an optional package, or raises with the way to install it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ValueError(
            f"{package} is not installed, which this kind of log needs. Install "
            f"`nanochat-jax[{extra}]`, or leave the option out."
        ) from None
