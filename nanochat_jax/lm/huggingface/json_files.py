"""JSON objects in files, with the name of the file in errors."""

import json
from pathlib import Path
from typing import Any


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: File to read.

    Returns:
      The object; an empty one if there is no such file.

    Raises:
      ValueError: If the file cannot be read, or is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(found).__name__}.")
    return found


def write_object(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object, indented.

    Args:
      path: File to write.
      content: The object.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
