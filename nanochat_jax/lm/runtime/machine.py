"""What numbers were measured on: hardware and versions."""

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nanochat_jax.lm.runtime import device

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "nanochat-jax")


def describe() -> dict[str, Any]:
    """Returns `hardware`, in a line, and `versions` by package."""
    return {
        "hardware": f"{device.describe()}, {processor()}",
        "versions": versions(),
    }


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Returns the versions of Python and of packages, as they are installed."""
    return {
        "python": platform.python_version(),
        **{name: version_of(name) for name in packages},
    }


def version_of(package: str) -> str:
    """Returns the version of a package, or that it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def memory() -> str:
    """Returns the memory of the machine and what of it is free, as Linux tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return "not known"
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    total, free = kilobytes["MemTotal"], kilobytes["MemAvailable"]
    return f"{total * 1024 / 1e9:.1f} GB, {free * 1024 / 1e9:.1f} GB of it free"


def processor() -> str:
    """Returns the name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(": ")[2] for line in lines if "model name" in line)
    return next(names, platform.machine())
