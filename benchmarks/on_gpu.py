"""Measures all that wants a GPU, in one run that keeps to a budget of time.

    python benchmarks/on_gpu.py --output results
    python benchmarks/on_gpu.py --output results --only products update_28m tests
    python benchmarks/on_gpu.py --output results --peer PATH/TO/optax

Parts run in turn, the most wanted first, each in a process of its own that is ended
when its time is over. Each writes `results/PART.json` and `results/PART.log`;
`results/summary.json` and `results/table.md`, for docs/RESULTS.md, are written anew
after every part, so that a run that is cut off keeps what it had.

`--dry-run` takes the parts with the smallest sizes on the CPU, to see that they run.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

FOLDER = Path(__file__).parent
SHORTEST = 10
"""Seconds under which no further part is begun."""

UPDATES = ("muon", "muon_bf16", "muon_8bit_bf16", "galore_8bit_bf16", "optax.adamw")
STEPS = (
    *("muon", "muon_8bit", "muon_8bit, in backward", "galore_8bit"),
    *("optax.contrib.muon", "optax.adamw"),
)
TESTS = ("test_polar", "test_muon", "test_quantize", "test_galore", "test_codecs")

# With Triton, products in float32, which GaLore has, take minutes to compile.
ON_GPU = {
    "JAX_PLATFORMS": "cuda",
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false"),
}
# Four processes share the device's memory, and laws hold for exact products.
TEST_SETTINGS = {
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the run.

    Attributes:
      title: Title of its table.
      command: Script or module and its arguments; `{json}` is the result's path.
      tiny: Arguments of a dry run, in place of those of `command` after the script.
      seconds: Most seconds that it may take.
    """

    title: str
    command: tuple[str, ...]
    tiny: tuple[str, ...]
    seconds: int


def script(name: str, *arguments: str) -> tuple[str, ...]:
    return (str(FOLDER / f"{name}.py"), *arguments)


def pytest(*names: str) -> tuple[str, ...]:
    files = [str(FOLDER.parent / "tests" / f"{name}.py") for name in names]
    options = ("-q", "-n", "4", "-m", "not slow", "-p", "no:cacheprovider")
    return ("-m", "pytest", *options, *files)


def parts(peers: Sequence[str]) -> dict[str, Part]:
    """Returns the parts by name, the most wanted first.

    Args:
      peers: Peers of `optimizer_step.py`.
    """
    beside = tuple(word for peer in peers for word in ("--peer", peer))
    update = lambda size: Part(
        f"Update, {size}",
        script("optimizer_step", "--size", size, "--only", *UPDATES, *beside),
        ("--size", "tiny", "--only", "muon", "--repeats", "1", *beside),
        90,
    )
    tiny = ("--config-file", "configs/tiny_cpu.toml")
    once = ("--batch-size", "1", "--seq-len", "32", "--repeats", "1")
    training = ("--compute-dtype", "bfloat16", "--batch-size", "8", "--seq-len", "1024")
    billions = lambda model, variant: Part(
        f"Peak memory of a step, {model} parameters, {variant}",
        script(
            "seven_billion", "--model", model, "--variant", variant, "--seq-len", "1024"
        ),
        (*tiny, "--variant", variant, "--seq-len", "32", "--rank", "16"),
        100,
    )
    nano = ("--config-file", "configs/nano_125m.toml")
    return {
        "products": Part(
            "Products of square matrices",
            script("products", "--largest", "8192", "--flops", "4e12"),
            ("--largest", "256", "--flops", "1e8", "--repeats", "1"),
            45,
        ),
        "update_28m": update("28m"),
        "train": Part(
            "Training step, nano_125m, 8 x 1,024 tokens, bfloat16",
            script("train_step", *nano, *training, "--only", *STEPS),
            (*once, "--only", "muon"),
            120,
        ),
        "step_1b": billions("1b", "8bit"),
        "tests": Part(
            "Tests of the transforms", pytest(*TESTS), pytest("test_noise")[1:], 150
        ),
        "newton_schulz": Part(
            "Newton-Schulz",
            script("newton_schulz"),
            ("--repeats", "1", "--methods", "quintic"),
            60,
        ),
        "update_nano": update("nano_125m"),
        "refresh": Part(
            "Change of GaLore's basis",
            script("refresh", "--largest", "8192"),
            ("--repeats", "1", "--largest", "768"),
            60,
        ),
        "step_7b": billions("7b", "both"),
    }


def run_part(name: str, part: Part, folder: Path, seconds: float, dry: bool) -> dict:
    """Runs a part and returns how it ended.

    Args:
      name: Its name.
      part: The part.
      folder: Where its result and its output go.
      seconds: Most seconds that it may take.
      dry: Whether to run it with the smallest sizes on the CPU.
    """
    command = (part.command[0], *part.tiny) if dry else part.command
    result = folder / f"{name}.json"
    result.unlink(missing_ok=True)
    if command[0].endswith(".py"):
        command = (*command, "--output", str(result))
    platform = {"JAX_PLATFORMS": "cpu"} if dry else ON_GPU
    settings = TEST_SETTINGS if name == "tests" else {}
    start = time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=FOLDER.parent,
            env={**os.environ, **platform, **settings},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
            ended = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ended = f"ended after {seconds:.0f} s"
    return {"part": name, "ended": ended, "seconds": time.monotonic() - start}


def table(part: Part, outcome: dict, folder: Path) -> list[str]:
    """Returns the lines of a part's Markdown table, or how it ended without one."""
    path = folder / f"{outcome['part']}.json"
    result = json.loads(path.read_text()) if path.exists() else {"rows": []}
    if result["rows"]:
        body = [_machine(result["machine"]), "", *_rows(result["rows"])]
    else:
        log = (folder / f"{outcome['part']}.log").read_text().strip().splitlines()
        body = [outcome["ended"] + (f": {log[-1]}" if log else "")]
    return [f"### {part.title}", "", *body, ""]


def _machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    return f"{machine['device']}, {versions}, {machine['date']}"


def _rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = [key.replace("_", " ") for key in rows[0]]
    body = [[_cell(x) for x in row.values()] for row in rows]
    lines = [names, ["---"] * len(names), *body]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(x: Any) -> str:
    if isinstance(x, dict):
        return ", ".join(f"{name}: {_cell(value)}" for name, value in x.items())
    if isinstance(x, list):
        return "x".join(map(str, x))
    if isinstance(x, float):
        return f"{x:.4g}"
    return f"{x:,}" if isinstance(x, int) else str(x)


def run_all(
    chosen: dict[str, Part], folder: Path, budget: float, dry: bool
) -> list[dict]:
    """Runs parts within a budget, and writes what there is after each.

    Args:
      chosen: Parts by name.
      folder: Where results go.
      budget: Seconds for all.
      dry: As for `run_part`.

    Returns:
      How each part ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    outcomes: list[dict] = []
    lines: list[str] = []
    for name, part in chosen.items():
        left = end - time.monotonic()
        if left < min(SHORTEST, part.seconds):
            outcomes.append({"part": name, "ended": "not begun: no time was left"})
            common.write(folder / "summary.json", {"parts": outcomes})
            continue
        outcome = run_part(name, part, folder, min(part.seconds, left), dry)
        outcomes.append(outcome)
        print(f"{name}: {outcome['ended']}, {outcome['seconds']:.0f} s", flush=True)
        lines += table(part, outcome, folder)
        common.write(folder / "summary.json", {"parts": outcomes})
        common.write_text(folder / "table.md", "\n".join(lines))
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="results", help="folder for results")
    parser.add_argument("--budget", type=float, default=480, help="seconds for all")
    parser.add_argument("--peer", action="append", default=[], metavar="PATH")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", nargs="*", choices=parts([]), default=[*parts([])])
    args = parser.parse_args()
    every = parts(args.peer)
    chosen = {name: every[name] for name in args.only}
    outcomes = run_all(chosen, Path(args.output).absolute(), args.budget, args.dry_run)
    sys.exit(any(outcome["ended"] != "done" for outcome in outcomes))


if __name__ == "__main__":
    main()
