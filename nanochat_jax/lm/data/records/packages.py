"""Packages of others, imported only where a data set needs them."""

import importlib
from typing import Any


def load_packages(*names: str, extra: str) -> list[Any]:
    """Returns modules of packages that are not dependencies of the trainer.

    Args:
      *names: Names of the modules.
      extra: Extra of this package that installs them.

    Raises:
      ValueError: If one is not installed.
    """
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise ValueError(
            f"this data set is read with {' and '.join(names)}, and {error.name} is "
            f'not installed. Install it: `pip install "nanochat-jax[{extra}]"`.'
        ) from None
