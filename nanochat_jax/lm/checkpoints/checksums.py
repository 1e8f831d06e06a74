"""Checksums of a checkpoint's files, in the format of `sha256sum`."""

import hashlib
from pathlib import Path

import jax


def write(directory: Path) -> None:
    """Writes the checksums of a checkpoint that is complete but not yet named.

    Args:
      directory: Folder with the checkpoints, the unnamed one among them.
    """
    if jax.process_index() != 0:
        return
    for folder in directory.glob("*.orbax-checkpoint-tmp*"):
        # Files at the top are Orbax's stamps, which it rewrites on naming the folder.
        files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
        lines = [f"{digest(f)}  {f.relative_to(folder).as_posix()}\n" for f in files]
        (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def damage(folder: Path) -> list[str]:
    """Returns a line for each damaged file; none if the checkpoint has no checksums.

    Args:
      folder: Folder of one checkpoint.
    """
    if not (folder / "SHA256SUMS").exists():
        return []
    text = (folder / "SHA256SUMS").read_text(encoding="utf-8", errors="replace")
    sums = [line.partition("  ")[::2] for line in text.splitlines()]
    changed = [name for stored, name in sums if digest(folder / name) != stored]
    return [f"{name} is missing or was changed" for name in changed]


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file, and nothing if there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
