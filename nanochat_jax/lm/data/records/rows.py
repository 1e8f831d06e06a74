"""Values of one field, record by record, from JSON lines and Parquet."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanochat_jax.lm.data.records.packages import load_packages
from nanochat_jax.lm.data.token_file import foreign

SUFFIXES = {"jsonl": (".jsonl", ".ndjson"), "parquet": (".parquet",)}
"""Ends of the names of files in a folder, by data set."""

_ROWS = 1024


class Problems:
    """What is wrong with records, up to ten, for one message."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, place: str, problem: str) -> None:
        """Adds a problem, and raises if there are many.

        Args:
          place: File and record.
          problem: What is wrong there, a sentence.

        Raises:
          ValueError: At the tenth problem; the message has all.
        """
        self._lines.append(f"{place}: {problem}")
        if len(self._lines) == 10:
            self._lines.append("Records after these were not looked at.")
            self.check()

    def check(self) -> None:
        """Raises if there were problems.

        Raises:
          ValueError: The message has all.
        """
        if self._lines:
            raise ValueError("\n".join(self._lines))


Rows = Callable[[Path, str, Problems], Iterator[tuple[str, Any]]]
"""Yields place and value of a field of each record that has it."""


def jsonl_rows(path: Path, field: str, problems: Problems) -> Iterator[tuple[str, Any]]:
    """Yields the values of a field of JSON objects, one a line; empty lines are none.

    Args:
      path: File in UTF-8.
      field: Key of the objects.
      problems: Takes lines that are no JSON objects or lack the field.

    Yields:
      File and line, and the value.

    Raises:
      ValueError: If the file is of another known format.
    """
    if found := foreign.recognise(path, text=False):
        raise ValueError(f"{path}: is no text, but {found.name}. {found.advice}.")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                problems.add(place, f"not UTF-8: {error}.")
                continue
            except json.JSONDecodeError as error:
                where = f"no JSON at column {error.colno}: {error.msg}"
                problems.add(place, f"{where}. Give one object a line.")
                continue
            except (ValueError, RecursionError) as error:  # long numbers, deep lists
                problems.add(place, f"cannot be read: {error}.")
                continue
            if not isinstance(record, dict):
                problems.add(place, "no JSON object. Give one object a line.")
            elif field not in record:
                problems.add(place, _no_field(field, record))
            else:
                yield place, record[field]


def parquet_rows(
    path: Path, field: str, problems: Problems
) -> Iterator[tuple[str, Any]]:
    """Yields the values of a column, some thousand rows in memory at a time.

    Args:
      path: Parquet file.
      field: Name of the column.
      problems: Takes files without it.

    Yields:
      File and row, from 1, and the value.

    Raises:
      ValueError: If pyarrow is missing, or the file is not Parquet.
    """
    pyarrow, parquet = load_packages("pyarrow", "pyarrow.parquet", extra="parquet")
    try:
        file = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}.") from None
    with file:
        names = file.schema_arrow.names
        if field not in names:
            problems.add(str(path), _no_field(field, names))
            return
        number = 0
        for batch in file.iter_batches(_ROWS, columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield f"{path}: row {number}", value


def _no_field(field: str, names: Any) -> str:
    return f"no field `{field}`, only {[*names][:10]}. Set `text_field`."


READERS: dict[str, Rows] = {"jsonl": jsonl_rows, "parquet": parquet_rows}
"""Readers of rows, by data set."""
