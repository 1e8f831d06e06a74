"""Documents: text files and the sources of Python's standard library.

Of many documents some are held out for validation, of a few the end of the text.
"""

import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from nanochat_jax.config import schema

HELD_OUT = 0.05
# With fewer documents, holding out complete ones would be too coarse.
MIN_DOCUMENTS = 20
# Folders of the standard library with tests, packages of others or no text.
NOT_STDLIB = frozenset(
    ("dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests")
)


def stdlib_documents() -> list[str]:
    """Reads the running Python's standard library, without its tests.

    The text changes with the version of Python, so losses do not compare across
    versions.

    Returns:
      The sources that are not empty, ordered by path.

    Raises:
      ValueError: If this Python has no sources on disk, or one cannot be read.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in _walk(root, NOT_STDLIB) if path.suffix == ".py"]
    schema.require(
        (len(paths) > 0, f"{root}: no Python sources here. Use the data set text.")
    )
    return _read_all(paths, _read_source)


def text_documents(paths: Sequence[str | Path]) -> list[str]:
    """Reads text files, and those in folders at any depth.

    Hidden files and folders in a folder are left out. A file found twice is read once.

    Args:
      paths: Files and folders.

    Returns:
      The texts that are not empty, in the order of `paths`, and by path in a folder.

    Raises:
      ValueError: If a path is missing, a folder is empty, or files cannot be read or
        are not UTF-8; the message names all of them.
    """
    files, errors = [], []
    for root in map(Path, paths):
        found = _walk(root) if root.is_dir() else [root]
        if not found:
            errors.append(f"{root}: no files in this folder.")
        files += found
    schema.require(*((False, error) for error in errors))
    once = dict.fromkeys(path.resolve() for path in files)
    return _read_all(once, lambda path: path.read_bytes().decode("utf-8"))


def split(documents: Sequence[str], least: int = 1) -> tuple[list[str], list[str]]:
    """Splits documents into training and held-out ones.

    Of many documents a twentieth is held out, by the hash of the text rather than its
    place, so that copies of a file stay on one side. Of a few documents the last
    twentieth of all characters is held out.

    Args:
      documents: Texts to split.
      least: Least characters to hold out of a few documents.

    Returns:
      Training texts and held-out texts.
    """
    distinct = set(documents)
    if len(distinct) < MIN_DOCUMENTS:
        return _split_tail(documents, least)
    ranked = sorted(distinct, key=lambda text: hashlib.sha256(text.encode()).digest())
    held = set(ranked[: round(len(ranked) * HELD_OUT)])
    return [d for d in documents if d not in held], [d for d in documents if d in held]


def _split_tail(documents: Sequence[str], least: int) -> tuple[list[str], list[str]]:
    total = sum(map(len, documents))
    left = max(total - max(round(total * HELD_OUT), least), 0)
    head, tail = [], []
    for text in documents:
        head.append(text[:left])
        tail.append(text[left:])
        left = max(left - len(text), 0)
    return [text for text in head if text], [text for text in tail if text]


def _walk(root: Path, skip: frozenset[str] = frozenset()) -> list[Path]:
    """Returns the files below `root` that are not hidden, ordered by path."""
    found = []
    for folder, folders, files in os.walk(root, onerror=_refuse_folder):
        folders[:] = [f for f in folders if f not in skip and not f.startswith(".")]
        found += [Path(folder, f) for f in files if not f.startswith(".")]
    return sorted(found)


def _refuse_folder(error: OSError) -> NoReturn:
    raise ValueError(f"{error.filename}: folder cannot be read: {error}.") from None


def _read_all(paths: Iterable[Path], read: Callable[[Path], str]) -> list[str]:
    texts, errors = [], []
    for path in paths:
        try:
            texts.append(read(path))
        except UnicodeDecodeError as error:
            errors.append(f"{path}: not UTF-8 text: {error}.")
        except (OSError, SyntaxError) as error:
            errors.append(f"{path}: cannot be read: {error}.")
    schema.require(*((False, error) for error in errors))
    return [text for text in texts if text]


def _read_source(path: Path) -> str:
    """Returns the text of a Python file, in the encoding it declares."""
    with tokenize.open(path) as file:
        return file.read()
