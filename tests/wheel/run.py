"""Builds the wheel and the source archive, and tries each where nothing else is.

    python tests/wheel/run.py

Both are built into `dist`. Each is installed, with its trainer, in an environment of
its own outside of the repository, where the command line, a step of the optimizer, and
the types are tried. What fails, fails loudly.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).parents[2]
DIST = ROOT / "dist"

TRIAL = """
import importlib.metadata, importlib.resources
import jax, jax.numpy as jnp
import nanochat_jax as nj

params = {"up": {"kernel": jnp.ones((64, 256)), "bias": jnp.ones(256)}}
tx = nj.muon(0.02, bits=8)
updates, _ = tx.update(params, tx.init(params), params)
assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(updates))
assert importlib.resources.files("nanochat_jax").joinpath("py.typed").is_file()
assert nj.__version__ == importlib.metadata.version("nanochat-jax")
assert "nanochat_jax" in nj.__file__ and "site-packages" in nj.__file__, nj.__file__
print(nj.__version__, nj.describe(tx, params), sep="\\n")
"""

COMMANDS = (
    ("--version",),
    ("--help",),
    ("train", "--help"),
    ("plan", "--depth", "2", "--no-compile"),
)


def main() -> int:
    """Builds and tries both; returns 0."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    wheel, archive = *DIST.glob("*.whl"), *DIST.glob("*.tar.gz")
    check_contents(wheel)
    for package in (wheel, archive):
        with tempfile.TemporaryDirectory() as folder:
            try_installed(package, pathlib.Path(folder))
        print(f"{package.name}: installs and works")
    return 0


def check_contents(wheel: pathlib.Path) -> None:
    """Refuses a wheel that lacks a module, or that brings other folders along."""
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names}
    info = {name for name in packages if name.endswith(".dist-info")}
    assert packages - info == {"nanochat_jax"}, sorted(packages)
    sources = {
        str(path.relative_to(ROOT)) for path in (ROOT / "nanochat_jax").rglob("*.py")
    }
    assert sources <= {*names}, sorted(sources - {*names})


def try_installed(package: pathlib.Path, folder: pathlib.Path) -> None:
    """Installs a package in a folder, and uses it from there."""
    run(sys.executable, "-m", "venv", folder / "venv")
    binaries = folder / "venv" / "bin"
    run(
        binaries / "pip", "install", "--quiet", "--disable-pip-version-check",
        "-c", ROOT / "constraints.txt", f"{package}[train]",
    )  # fmt: skip
    run(binaries / "python", "-c", TRIAL, cwd=folder)
    for args in COMMANDS:
        run(binaries / "nanochat-jax", *args, cwd=folder)


def run(*command: object, cwd: pathlib.Path | None = None) -> None:
    """Runs a command; it has to end well."""
    subprocess.run([str(word) for word in command], cwd=cwd, check=True)


if __name__ == "__main__":
    sys.exit(main())
