"""Files and folders that a crash leaves old or new, never half written."""

import contextlib
import os
import tempfile
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


@contextlib.contextmanager
def making_folder(folder: Path) -> Iterator[Path]:
    """Makes a folder that gets its name when the block ends.

    Args:
      folder: Folder to write, from `new_folder`.

    Yields:
      An empty folder beside it to fill. It is deleted if the block raises.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}.", dir=folder.parent
    ) as temporary:
        made = Path(temporary) / "folder"
        made.mkdir()
        yield made
        if folder.exists():
            folder.rmdir()
        made.rename(folder)


def new_folder(path: str | Path) -> Path:
    """Returns the absolute path of a folder to write, if it is new or empty.

    Args:
      path: The folder.

    Raises:
      ValueError: If it has files, or is one.
    """
    if why := why_not_new(path):
        raise ValueError(why)
    return Path(path).expanduser().absolute()


def why_not_new(path: str | Path) -> str | None:
    """Returns why a folder cannot be written, `None` if it is new or empty.

    Args:
      path: The folder.
    """
    folder = Path(path).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return f"{path}: is there already. Give a new or an empty folder."
    return None


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, in one piece.

    Args:
      path: File to write or replace; its folder is made.
      text: Content of the file.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
