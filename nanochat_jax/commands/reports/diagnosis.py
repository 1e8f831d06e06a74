"""Faults of this machine and its installation, in words."""

from collections.abc import Mapping

import jax
from rich.console import Console
from rich.table import Table

from nanochat_jax.commands.shared import say
from nanochat_jax.lm.runtime import installation, machine
from nanochat_jax.numerics import resolve_dtype


def diagnose(console: Console) -> int:
    """Prints the findings.

    Args:
      console: Where to print.

    Returns:
      Number of faults.
    """
    devices, problems = _devices()
    plugins = installation.installed_plugins()
    errors = installation.product_errors(devices)
    platforms = [each.platform for each in devices]
    problems += installation.unmet_requirements()
    problems += installation.plugin_problems(
        plugins, platforms, installation.has_nvidia_gpu()
    )
    problems += installation.product_problems(errors)
    packages = ("nanochat-jax", *installation.PACKAGES)
    console.print(_table("Versions", {**machine.versions(packages), **plugins}))
    optional = {name: machine.version_of(name) for name in installation.OPTIONAL}
    console.print(_table("\nFor plots and logs", optional))
    console.print(_table("\nMachine", _facts(devices, errors)))
    say(console)
    for problem in problems:
        say(console, f"Problem: {problem.what}\n  What to do: {problem.remedy}")
    if not problems:
        where = platforms[0].upper()
        say(console, f"Nothing is wrong. Runs compute on the {where}.")
    return len(problems)


def _devices() -> tuple[list[installation.Device], list[installation.Problem]]:
    """Returns the devices of JAX and the CPU, or why JAX finds none."""
    try:
        return list(dict.fromkeys([*jax.devices(), *jax.devices("cpu")])), []
    # JAX asserts that there is a backend, without a message.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or "no backend"
        remedy = "set JAX_PLATFORMS to platforms that are installed, or unset it."
        return [], [installation.Problem(f"JAX finds no device: {reason}", remedy)]


def _facts(
    devices: list[installation.Device], errors: Mapping[str, float | str]
) -> dict[str, str]:
    """Returns facts about the machine, by name."""
    facts = {
        "processor": f"{machine.processor()}, {machine.available_threads()} threads",
        "memory": _memory(devices),
        "large pages": machine.large_pages(),
        "NVIDIA driver": "loaded" if installation.has_nvidia_gpu() else "not loaded",
        **installation.variables(),
    }
    if not devices:
        return facts
    native = resolve_dtype("auto") == "bfloat16"
    return {
        "devices": machine.device_names(),
        **facts,
        "float32 product": "\n".join(
            f"{name}: {error if isinstance(error, str) else f'off by {error:.0e}'}"
            for name, error in errors.items()
        ),
        "bfloat16": "native" if native else "emulated, slower than float32",
        'ns_dtype = "auto"': f"Newton-Schulz in {resolve_dtype('auto')}",
    }


def _memory(devices: list[installation.Device]) -> str:
    """Returns the memory of each device, and of the machine for its processor."""
    lines = {
        f"{each.platform}:{each.id}": f"{limit / 1e9:.1f} GB for JAX"
        for each in devices
        if (limit := (each.memory_stats() or {}).get("bytes_limit"))
    }
    lines["machine" if lines else ""] = machine.memory()
    return "\n".join(f"{name}: {x}" if name else x for name, x in lines.items())


def _table(title: str, rows: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for row in rows.items():
        table.add_row(*row)
    return table
