"""The machine: which device a run computes on, and hardware and versions in words.

There is no fallback from one device to another.
"""

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "nanochat-jax")

_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_LARGE_PAGES_ASKED = "glibc.malloc.hugetlb=1"


def use_device(device: str, threads: int | None = None) -> None:
    """Selects the device of this process, before anything is computed.

    Args:
      device: `"auto"` for JAX's default, `"cpu"` or `"gpu"`.
      threads: Processors to use on the CPU; all if not given.

    Raises:
      ValueError: If there is no such device, or not as many processors.
    """
    if threads is not None:
        _limit_threads(threads)
    if device == "auto":
        return
    jax.config.update("jax_platforms", device)
    try:
        jax.devices()
    # JAX asserts that there is a backend, without a message.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"`--device {device}`: JAX {jax.__version__} finds no such device"
            f"{f' ({error})' if str(error) else ''}. For an NVIDIA GPU install "
            "`nanochat-jax[cuda13]`, or [cuda12] for drivers before 580; or pass "
            "`--device cpu`."
        ) from None


def device_names() -> str:
    """Returns the devices in words, such as `"1 CPU device, 2 threads"`."""
    devices = jax.devices()
    platform, plural = devices[0].platform, "s" if len(devices) > 1 else ""
    text = f"{len(devices)} {platform.upper()} device{plural}"
    if platform == "cpu":
        threads = available_threads()
        return f"{text}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{text} ({devices[0].device_kind})"


def hardware_and_versions() -> dict[str, Any]:
    """Returns what numbers were measured on: `hardware`, and `versions` by package."""
    return {"hardware": f"{device_names()}, {processor()}", "versions": versions()}


def available_threads() -> int:
    """Returns how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Returns the installed versions of Python and of packages.

    Args:
      packages: Names of distributions.
    """
    found = {name: version_of(name) for name in packages}
    return {"python": platform.python_version(), **found}


def version_of(package: str) -> str:
    """Returns the version of a package, or `"not installed"`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def memory() -> str:
    """Returns total and free memory in words, on Linux; else `"not known"`."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return "not known"
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    total, free = kilobytes["MemTotal"], kilobytes["MemAvailable"]
    return f"{total * 1024 / 1e9:.1f} GB, {free * 1024 / 1e9:.1f} GB of it free"


def large_pages(enabled: Path = _LARGE_PAGES) -> str:
    """Returns whether memory comes in large pages, in words, or how to have them.

    XLA asks for the temporaries of a program at each call of it, on a processor. More
    than 32 MB come as new pages every time, thousands of small ones or few large ones.

    Args:
      enabled: File of Linux that says who has them.
    """
    try:
        chosen = enabled.read_text(encoding="ascii").partition("[")[2].partition("]")[0]
    except OSError:
        return "not known"
    asked = _LARGE_PAGES_ASKED in os.environ.get("GLIBC_TUNABLES", "")
    if chosen == "always" or (chosen == "madvise" and asked):
        return "used"
    if chosen == "never":
        return "turned off in this kernel"
    return (
        f"not asked for; with GLIBC_TUNABLES={_LARGE_PAGES_ASKED} a step on a "
        "processor may take a twentieth less time"
    )


def processor() -> str:
    """Returns the model name of the processor; its architecture if not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(": ")[2] for line in lines if "model name" in line)
    return next(names, platform.machine())


def _limit_threads(threads: int) -> None:
    # XLA sizes its thread pool by the processors this process may run on.
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("`--threads` needs Linux; leave it out to use all processors.")
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(allowed):
        raise ValueError(
            f"`--threads` must lie between 1 and {len(allowed)}, the processors this "
            f"process may use, got {threads}."
        )
    os.sched_setaffinity(0, allowed[:threads])
