"""What every benchmark shares: interleaved medians, and what they were measured on."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import optax
import peers
from rich.console import Console
from rich.table import Table

Calls = Mapping[str, Callable[[], Any]]


def interleave(calls: Calls, repeats: int) -> dict[str, list[float]]:
    """Returns seconds of each call, all called in turn, so that drift hits all alike.

    Each is called once before, uncounted.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def optax_muon(
    rate: float, beta: float = 0.95, axes: Mapping[str, Any] | None = None
) -> optax.GradientTransformation:
    """Returns Optax's Muon, by axes of paths, else for the last two, stacked or not."""
    return peers.installed().muon(rate, axes, beta=beta)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratio(base: Sequence[float], values: Sequence[float]) -> float:
    """Returns the median of `base` over `values`, turn by turn: times faster."""
    return median([b / v for b, v in zip(base, values, strict=True)])


def machine() -> dict[str, Any]:
    """Returns hardware and versions."""
    device = jax.devices()[0]
    names = ("jax", "jaxlib", "optax", "numpy")
    return {
        "device": f"{device.platform} ({device.device_kind})",
        "processor": _processor(),
        "threads": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "date": time.strftime("%Y-%m-%d"),
    }


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows as a table; numbers are given ready for reading."""
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "variant" else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=120).print(table)


def write(path: str | Path | None, result: Any) -> None:
    """Writes a result as JSON, in one piece, if there is a path for it."""
    if path is None:
        return
    write_text(Path(path), json.dumps(result, indent=2))


def write_text(path: Path, text: str) -> None:
    """Writes a file in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n")
    temporary.replace(path)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), "")
