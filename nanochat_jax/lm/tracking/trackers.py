"""Where the metrics of a run go: its file, and TensorBoard or Weights & Biases.

`metrics.MetricsWriter` is the sink that every run has. The others need a package each,
the extras `tensorboard` and `wandb`, which is imported when such a sink is made. Names
of metrics are those of `metrics.jsonl` everywhere.
"""

import importlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from nanochat_jax.lm.runtime import replacing
from nanochat_jax.lm.tracking.jsonl import numbers


class Sink(Protocol):
    """Takes the metrics of a run, step after step."""

    def resume(self, step: int) -> None:
        """Prepares for a run that goes on after `step`; -1 for one that begins.

        Without it the run goes on where the sink stopped. To be called before anything
        is written: what was written for later steps is not to be there twice.
        """
        ...

    def write(self, values: Mapping[str, Any]) -> None:
        """Takes numbers, or arrays of one number, by name; `step` is among them."""
        ...

    def close(self) -> None:
        """Writes out what is held back."""
        ...


class TensorBoardSink:
    """Writes event files for TensorBoard.

    Event files are only ever added to. So a run that is resumed marks, in a new one,
    the step from which on TensorBoard hides what the older ones hold.
    """

    def __init__(self, directory: str | Path):
        """Settles the folder; it is made when something is written.

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
        """Has TensorBoard hide what was written after `step`."""
        self._first = step + 1

    def write(self, values: Mapping[str, Any]) -> None:
        """Writes a scalar for each number."""
        if self._writer is None:
            self._writer = self._package.SummaryWriter(
                str(self._directory),
                purge_step=self._first,
                # Names only have whole seconds, and a file of the same name is lost.
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

    The run is kept on this machine, for `wandb sync` to upload it. With the environment
    variable `WANDB_MODE=online` it is uploaded while it trains.

    What was logged cannot be taken back. So the folder also has a file that says which
    run it is and up to which step it was logged, and a run that is resumed logs later
    steps only: its numbers for the others are the same.
    """

    def __init__(self, project: str, config: Mapping[str, Any], directory: str | Path):
        """Settles what is logged; nothing is before something is written.

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
        """Goes on with the run of the folder, or begins another if `step` is -1."""
        if step < 0:
            self._file.unlink(missing_ok=True)

    def write(self, values: Mapping[str, Any]) -> None:
        """Logs the numbers, if their step was not logged before."""
        if self._run is None:
            self._run = self._begin()
        logged = numbers(values)
        step = int(logged.pop("step"))
        if step > self._logged:
            self._run.log(logged, step=step)
            self._logged = step
            self._remember()

    def close(self) -> None:
        """Ends the run, or this part of it."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _begin(self) -> Any:
        """Starts the run, or goes on with that of the folder."""
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
            # It would take the terminal from the progress display.
            settings=self._package.Settings(console="off"),
        )

    def _remember(self) -> None:
        text = json.dumps({"id": self._run.id, "step": self._logged})
        with replacing(self._file) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def _load(package: str, extra: str) -> Any:
    """Imports an optional package, or says how to get it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ValueError(
            f"{package} is not installed, which this kind of log needs. Install "
            f"`nanochat-jax[{extra}]`, or leave the option out."
        ) from None
