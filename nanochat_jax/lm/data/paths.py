"""Files that paths name: files, folders and patterns, in a stable order."""

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from nanochat_jax.config import schema

# Ends of the names of files that describe a token file beside them.
_COMPANIONS = (".idx", ".ds.index", ".ds.metadata", ".ds.loss")


def find_files(paths: Sequence[str | Path], suffixes: tuple[str, ...]) -> list[Path]:
    """Returns the files that paths name.

    A folder gives the files directly in it with one of the suffixes, and a pattern such
    as `shards/*.bin` those that match, without the files that describe others; both in
    the order of their names, where numbers count by value. Paths keep their order, and
    a file that is named twice is read once.

    Args:
      paths: Files, folders and patterns.
      suffixes: Ends of the names of files in a folder.

    Raises:
      ValueError: If a path names no file; the message lists all such paths.
    """
    found, errors = [], []
    for path in map(Path, paths):
        files = _find(path, suffixes)
        if not files:
            errors.append((False, f"{path}: {_nothing(path, suffixes)}"))
        found += files
    schema.require(*errors)
    once: dict[Path, Path] = {}
    for path in found:
        once.setdefault(path.resolve(), path)
    return list(once.values())


def _find(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        files = (file for file in path.iterdir() if file.suffix in suffixes)
        return _ordered(file for file in files if file.name[0] != ".")
    return _ordered(map(Path, glob.glob(str(path), recursive=True)))


def _ordered(files: Iterable[Path]) -> list[Path]:
    """Returns the files that describe no others, ordered by name."""
    files = {file for file in files if file.is_file()}
    own = {
        file
        for file in files
        if not file.name.endswith(_COMPANIONS)
        and not (file.suffix == ".json" and file.with_suffix("") in files)
    }
    # Companions alone are refused by name where they are read.
    return sorted(own or files, key=_by_name)


def _by_name(path: Path) -> list[tuple[str, int]]:
    """Returns text and numbers of a path, so that 2 comes before 10."""
    parts = re.findall(r"(\D*)(\d*)", str(path))
    return [(text, int(number or -1)) for text, number in parts]


def _nothing(path: Path, suffixes: tuple[str, ...]) -> str:
    if path.is_dir():
        return f"no files {', '.join(f'*{s}' for s in suffixes)} in this folder."
    if glob.has_magic(str(path)):
        return "no file matches. Check the pattern."
    return "no such file. Give files, folders or a pattern."
