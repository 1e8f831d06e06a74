"""Sizes in bytes as text, such as `"24GB"`."""

import re

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Returns the number of bytes that a text gives.

    Example:
      >>> parse_bytes("24GB"), parse_bytes("22.5 GB"), parse_bytes("24GiB")
      (24000000000, 22500000000, 25769803776)

    Args:
      text: A number and a unit: B, kB, MB, GB and TB count in thousands, KiB, MiB, GiB
        and TiB in steps of 1024, in letters of either case.

    Raises:
      ValueError: If the text has another form, or is less than a byte.
    """
    found = _SIZE.fullmatch(text)
    if found:
        number, prefix, binary = found.groups()
        size = float(number) * (1024 if binary else 1000) ** _POWERS[prefix.lower()]
        if size >= 1 and (prefix or not binary):
            return int(size)
    raise ValueError(
        'must be a number of bytes with a unit, such as "24GB", "22.5 GB" or "24GiB", '
        f"got {text!r}."
    )
