"""Writing files so that a crash leaves the old one or the new one, never half of it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, and moves it there when that is done.

    Args:
      path: File to write.

    Yields:
      Where to write it. If writing fails, nothing is left there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
