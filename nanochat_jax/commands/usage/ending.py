"""How a command ends that does not get to its end: errors, and Ctrl-C.

A line of an error begins with `error: `, further lines are indented. On a terminal they
are wrapped between words, elsewhere each is one line.
"""

import shutil
import sys
import textwrap
from typing import Any, NoReturn

BAD_USAGE, INTERRUPTED = 2, 130
"""Exit codes."""

# Without the line of a progress display, and with the cursor, which it hides.
_CLEARED = "\r\x1b[2K\x1b[?25h"


def say(kind: str, message: str) -> None:
    """Prints an error or a warning on stderr.

    Args:
      kind: `error` or `warning`.
      message: Its lines.
    """
    first, *others = message.splitlines() or [""]
    lines = [f"{kind}: {first}", *(f"  {line}" for line in others)]
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        lines = [part for line in lines for part in _wrapped(line, width)]
    print("\n".join(lines), file=sys.stderr)


def fail(message: str) -> NoReturn:
    """Ends with an error and the exit code of bad usage.

    Args:
      message: Lines of the error.
    """
    say("error", message)
    sys.exit(BAD_USAGE)


def of_system(error: OSError) -> str:
    """Returns the message of an error of the system, such as a full disk.

    Args:
      error: The error.
    """
    if error.strerror is None:
        return str(error)
    paths = [str(path) for path in (error.filename, error.filename2) if path]
    return f"{' -> '.join(paths)}: {error.strerror}" if paths else error.strerror


def interrupted(command: Any = None, *, amid: bool = False) -> int:
    """Says that Ctrl-C ended a command, and how to go on if it knows.

    Args:
      command: The command, which may have a method `how_to_go_on` that returns a
        sentence or nothing.
      amid: Whether the process ends next, in the midst of its work: a progress display
        that is still open would print itself below the message.

    Returns:
      The exit code.
    """
    how = getattr(command, "how_to_go_on", lambda: "")() or ""
    out = (amid and sys.__stdout__) or sys.stdout
    err = (amid and sys.__stderr__) or sys.stderr
    if out.isatty():
        out.write(_CLEARED)
    out.flush()
    print(f"\ninterrupted. {how}".rstrip(), file=err, flush=True)
    return INTERRUPTED


def _wrapped(line: str, width: int) -> list[str]:
    return textwrap.wrap(
        line,
        width,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
