"""Installs real JAX packages, and checks the library on the trees of their models.

    python tests/models/run.py [environment ...]

Each environment of `environments.toml` is made once, in `.venv-models`; what cannot be
installed or imported is skipped by name. The summary counts the leaves of each package.
"""

import collections
import json
import os
import pathlib
import subprocess
import sys
import tomllib

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
ENVIRONMENTS = ROOT / ".venv-models"
SOURCES = {
    "model": "with the model",
    "classes": "classes in the tree",
    "names": "names alone",
}
# Leaves whose axes names alone leave open, over all packages.
MOST_REFUSED = 40


def main(names: list[str]) -> int:
    """Checks the named environments, or all of them; returns the exit code."""
    environments = tomllib.loads((HERE / "environments.toml").read_text())
    records, skips, failures = [], [], []
    for name in names or environments:
        problems = _install(name, environments[name])
        skips += problems
        if problems and not _python(name).exists():
            continue
        print(f"== {name}", flush=True)
        result = ENVIRONMENTS / f"{name}.json"
        result.unlink(missing_ok=True)
        failures += [name] if _check(name, result) else []
        records += json.loads(result.read_text()) if result.exists() else []
    return _summarise(records, skips, failures)


def _python(name: str) -> pathlib.Path:
    return ENVIRONMENTS / name / "bin" / "python"


def _install(name: str, wanted: dict) -> list[str]:
    """Makes an environment, unless it is there; returns what could not be installed."""
    ready = ENVIRONMENTS / name / "ready.json"
    base = _interpreter(wanted)
    if base is None:
        return [f"{name}: no Python {wanted['python']}"]
    pins = (ROOT / "constraints.txt").read_text() if _constrained(wanted) else ""
    content = [wanted["packages"], wanted["alone"], pins]
    if ready.exists():
        made = json.loads(ready.read_text())
        if made["content"] == content:
            return made["problems"]
    print(f"== installing {name}", flush=True)
    subprocess.run([*base, "-m", "venv", "--clear", ENVIRONMENTS / name], check=True)
    tools = ["jax", "optax", "jaxtyping", "pytest"]
    problems = _pip(name, [*tools, *wanted["packages"]], wanted)
    problems += _pip(name, ["--no-deps", *wanted["alone"]], wanted)
    problems += _pip(name, ["--no-deps", "-e", str(ROOT)], wanted)
    ready.write_text(json.dumps({"content": content, "problems": problems}))
    return problems


def _interpreter(wanted: dict) -> list[str] | None:
    """Returns the command of the Python that an environment needs, if it is there."""
    if "python" not in wanted:
        return [sys.executable]
    command = ["env", f"PYENV_VERSION={wanted['python']}", f"python{wanted['python']}"]
    found = subprocess.run([*command, "--version"], capture_output=True)
    return command if found.returncode == 0 else None


def _constrained(wanted: dict) -> bool:
    return wanted.get("constrained", True)


def _pip(name: str, wanted_packages: list[str], wanted: dict) -> list[str]:
    """Installs packages, one by one if not all will; returns those that do not."""
    options = [x for x in wanted_packages if x.startswith("-")]
    packages = [x for x in wanted_packages if not x.startswith("-")]
    pins = ["-c", str(ROOT / "constraints.txt")] if _constrained(wanted) else []
    command = [_python(name), "-m", "pip", "install", "--quiet"]
    command += ["--disable-pip-version-check", *pins, *options]
    install = lambda packages: subprocess.run(
        [*command, *packages], capture_output=True, text=True
    )
    if install(packages).returncode == 0:
        return []
    problems = []
    for package in packages:
        done = install([package])
        if done.returncode:
            why = [line for line in done.stderr.splitlines() if "ERROR" in line]
            problems.append(f"{package}: {(why or ['does not install'])[-1]}")
    return problems


def _check(name: str, records: pathlib.Path) -> int:
    """Runs the tests in an environment; returns their exit code."""
    command = [_python(name), "-m", "pytest", "-c", HERE / "pytest.ini", HERE]
    command += ["--environment", name, "--records", records]
    return subprocess.run(command, cwd=ROOT, env={**os.environ}).returncode


def _summarise(records: list, skips: list[str], failures: list[str]) -> int:
    counts = collections.defaultdict(collections.Counter)
    refused, missing = [], {}
    for record in records:
        package = record["tree"].split()[0]
        if "skipped" in record:
            missing[record["tree"]] = record["skipped"]
            continue
        found = record["found"].split(":")[0].split(",")[0]
        counts[record["source"], package][found] += 1
        if found == "refused" and record["source"] == "names":
            refused.append(record)
    for source, title in SOURCES.items():
        rows = {package: n for (kind, package), n in counts.items() if kind == source}
        _table(title, rows)
    print(f"\nRefused from names alone, {len(refused)} of at most {MOST_REFUSED}:")
    for record in refused:
        shape = tuple(record["shape"])
        print(f"  {record['tree']}: {record['path']} {shape}: {record['reason']}")
    skips = [*skips, *(f"{tree}: {why}" for tree, why in missing.items())]
    print(f"\nSkipped, {len(skips)}:", *skips, sep="\n  ")
    print(f"\nEnvironments with failures, {len(failures)}:", *failures)
    return int(bool(failures) or len(refused) > MOST_REFUSED)


def _table(title: str, rows: dict) -> None:
    columns = "right", "refused", "wrong"
    print(f"\n{title:24}{'leaves':>8}" + "".join(f"{name:>9}" for name in columns))
    total = collections.Counter()
    for package, count in rows.items():
        total += count
        print(_row(package, count, columns))
    print(_row("all", total, columns))


def _row(name: str, count: collections.Counter, columns: tuple[str, ...]) -> str:
    cells = "".join(f"{count[column]:9}" for column in columns)
    return f"  {name:22}{sum(count.values()):8}{cells}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
