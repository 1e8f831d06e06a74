"""Measures how long the command line takes to answer, in processor and wall seconds.

    python benchmarks/start_up.py --repeats 5
    python benchmarks/start_up.py --beside ../other-checkout --plan

Commands are run in turn, each in a process of its own, from this checkout and from
another one if it is given; what is printed is the median. `--plan` adds `plan` with and
without compiling, once.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "nano_125m_8bit_galore.toml"
HELP = (["--help"], ["doctor", "--help"])
PLAN = ["plan", "--config-file", str(CONFIG)]


def measure(tree: Path, args: list[str], folder: str) -> tuple[float, float]:
    """Returns processor and wall seconds of a command of a checkout."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    # From an empty folder: `-m` takes a package in the working folder first.
    subprocess.run(
        [sys.executable, "-m", "nanochat_jax", *args],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(tree)},
        stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    used = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return used, wall - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beside", type=Path, help="another checkout")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plan", action="store_true")
    flags = parser.parse_args()
    others = [flags.beside.resolve()] if flags.beside else []
    jobs = [(tree, args) for args in HELP for tree in (ROOT, *others)] * flags.repeats
    if flags.plan:
        jobs += [(tree, PLAN) for tree in (ROOT, *others)]
        jobs += [(ROOT, [*PLAN, "--no-compile"])]
    found: dict[tuple[str, Path], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for tree, args in jobs:
            key = " ".join(args).replace(str(CONFIG), CONFIG.name), tree
            found.setdefault(key, []).append(measure(tree, args, folder))
    print("| command | checkout | processor s | wall s |\n|---|---|---|---|")
    for (command, tree), times in found.items():
        used, wall = (statistics.median(column) for column in zip(*times, strict=True))
        which = "this" if tree == ROOT else "other"
        print(f"| `{command}` | {which} | {used:.2f} | {wall:.2f} |")


if __name__ == "__main__":
    main()
