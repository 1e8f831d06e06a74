"""Files and folders that a crash leaves old or new, never half written."""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanochat_jax.config import schema


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
      ValueError: If it has files, is one, or cannot be written.
    """
    if why := why_not_new(path):
        raise ValueError(why)
    return Path(path).expanduser().absolute()


def why_not_new(path: str | Path) -> str | None:
    """Returns why a new folder cannot be written, `None` if it can.

    Args:
      path: The folder; it may be there and empty.
    """
    folder = Path(path).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return f"{path}: is there already. Give a new or an empty folder."
    return _refusal(path, _why_no_folder(folder.parent))


def require_writable(
    *, folders: Iterable[str | Path] = (), files: Iterable[str | Path] = ()
) -> None:
    """Refuses paths that cannot be written, before there is anything to write.

    Writes nothing that has a name: it opens a file without one in the folder, or in
    the nearest folder above that exists.

    Args:
      folders: Folders to write files in; they need not exist yet.
      files: Files to write or replace.

    Raises:
      ValueError: If a path cannot be written; all are listed.
    """
    why = {path: _why_no_folder(Path(path).expanduser()) for path in folders}
    why |= {path: _why_no_file(Path(path).expanduser()) for path in files}
    refused = [_refusal(path, reason) for path, reason in why.items()]
    schema.require(*((text is None, text or "") for text in refused))


def _refusal(path: str | Path, reason: str) -> str | None:
    if not reason:
        return None
    return f"{path}: cannot be written: {reason}. Give another path."


def _why_no_file(file: Path) -> str:
    return "it is a folder" if file.is_dir() else _why_no_folder(file.parent)


def _why_no_folder(folder: Path) -> str:
    """Returns why files cannot be written in a folder; nothing if they can."""
    above = folder.absolute()
    try:
        while not above.exists():
            above = above.parent
        with tempfile.TemporaryFile(dir=above):
            return ""
    except NotADirectoryError:
        return f"{above} is a file"
    except OSError as error:
        return f"{error.strerror or error}: {above}"


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, in one piece.

    Args:
      path: File to write or replace; its folder is made.
      text: Content of the file.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
