"""The metrics file of a run, `metrics.jsonl`: one JSON object per line.

Keys: `step, tokens, loss, lr, grad_norm, tokens_per_s, elapsed_s`; where they are known
`memory_bytes, mfu, optimizer_share, skipped`; at evaluations `val_loss, val_bpb`. JSON
has no infinities and no NaN, so a number that is not finite is written as `null`.
Missing values have no key.
"""

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from nanochat_jax.lm.runtime import write_text


class MetricsWriter(contextlib.AbstractContextManager["MetricsWriter", None]):
    """Appends to a metrics file.

    Every line is flushed before `write` returns: a run that is killed loses at most the
    line it was writing.

    Attributes:
      path: The file.
    """

    def __init__(self, path: str | Path):
        """Stores the path; file and folder are made by the first `write`.

        Args:
          path: File to append to.
        """
        self.path = Path(path)
        self._file: IO[str] | None = None

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; another `write` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends one line.

        Args:
          values: Numbers, or arrays of one number, by name; `None` is left out.
        """
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        record = {name: _as_json(x) for name, x in numbers(values).items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def resume(self, step: int) -> None:
        """Drops the lines after `step`, and an incomplete last line.

        A run that resumes from a checkpoint takes the later steps a second time.

        Args:
          step: Step of the checkpoint. -1 drops everything.

        Raises:
          ValueError: If a line other than the last is not a JSON object with a `step`.
        """
        if not self.path.exists():
            return
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        self.close()
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))


def numbers(values: Mapping[str, Any]) -> dict[str, int | float]:
    """Returns metrics as numbers of Python.

    Args:
      values: Numbers, or arrays of one number, by name; `None` is left out.
    """
    as_number = lambda value: value.item() if hasattr(value, "item") else value
    return {name: as_number(x) for name, x in values.items() if x is not None}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads a metrics file.

    Args:
      path: File to read, possibly of a run in progress: an incomplete last line is
        skipped.

    Returns:
      The lines in order. `None` stands for a number that was not finite.

    Raises:
      ValueError: If there is no such file, or a line other than the last is not a JSON
        object with a `step`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Give the `metrics.jsonl` of a run.")
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = [_record(line) for line in lines]
    wrong = [number for number, record in enumerate(records, 1) if record is None]
    if wrong:
        raise ValueError(
            f"{path}: every line must be a JSON object with a `step`, which lines "
            f"{wrong} are not. Delete them, or write to another directory."
        )
    return [r for r in [*records, _record(last)] if r is not None]


def _record(line: str) -> dict[str, Any] | None:
    """Returns the object on a line, or `None` if it holds none with a `step`."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def _as_json(number: int | float) -> int | float | None:
    """Returns a number, or `None` for one that JSON cannot hold."""
    return number if math.isfinite(number) else None
