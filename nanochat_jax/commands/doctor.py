"""`nanochat-jax doctor`: faults of this machine and its installation."""

import dataclasses
import sys

from rich.console import Console


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Checks versions, devices and plugins, and multiplies matrices on each device.

    Ends with exit code 1 if something is wrong, and says what to do about it.
    """

    def run(self) -> None:
        """Prints the findings."""
        from nanochat_jax.commands.reports import diagnosis

        if diagnosis.diagnose(Console()):
            sys.exit(1)
