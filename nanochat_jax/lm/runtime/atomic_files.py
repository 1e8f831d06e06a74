"""Files that a crash leaves old or new, never half written."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Makes the folder of a file, and replaces the file when the block ends.

    Args:
      path: File to write.

    Yields:
      A path beside it to write to. It is deleted if the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, in one piece.

    Args:
      path: File to write or replace; its folder is made.
      text: Content of the file.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
