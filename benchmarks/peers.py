"""Muon of other checkouts, imported beside the installed packages."""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import optax


@dataclasses.dataclass(frozen=True)
class Peer:
    """A function of a checkout that returns an Optax transformation.

    Attributes:
      make: The function, of a learning rate.
      numbers: Its class of dimension numbers, if it takes any.
      version: What it is called in results: package, version, commit or path.
    """

    make: Callable[..., optax.GradientTransformation]
    numbers: Callable[[int | tuple, int | tuple], Any] | None
    version: str

    def muon(
        self, rate: float, axes: Mapping[str, Any] | None = None, **options: Any
    ) -> optax.GradientTransformation:
        """Returns its Muon, by axes of paths, else for the last two, stacked or not."""
        if self.numbers is None:
            return self.make(rate, **options)
        last = self.numbers(-2, -1)
        views = {name: view for name, view in (axes or {}).items() if view}
        given = {k: self.numbers(v.fan_in, v.fan_out) for k, v in views.items()}
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
        dimensions = lambda params: jax.tree.map_with_path(
            lambda path, _: given.get(name(path), last), params
        )
        return self.make(rate, muon_weight_dimension_numbers=dimensions, **options)


def installed() -> Peer:
    """Returns the Muon of the installed Optax."""
    contrib = optax.contrib
    version = f"optax {optax.__version__}"
    return Peer(contrib.muon, contrib.MuonDimensionNumbers, version)


def load(spec: str) -> Peer:
    """Returns the Muon of a checkout, imported under the name that it has there.

    What is installed under that name is put aside meanwhile, and put back. Other
    packages that it imports are the installed ones, or those of `PYTHONPATH`.

    Args:
      spec: Path of a file or of a package folder, and after a colon the function in it;
        `contrib.muon` of a package and `muon` of a file if it is not given.

    Raises:
      ValueError: If there is no such file, package or function, or if the import leads
        to another place.
    """
    place, _, name = spec.partition(":")
    path = Path(place).resolve()
    if not path.is_file() and not (path / "__init__.py").is_file():
        raise ValueError(f"a peer must be a Python file or a package, got {place}.")
    parts = (name or ("contrib.muon" if path.is_dir() else "muon")).split(".")
    with _put_aside(path.stem), _searched_first(str(path.parent)):
        module = importlib.import_module(path.stem)
    try:
        owner = functools.reduce(getattr, parts[:-1], module)
        make = getattr(owner, parts[-1])
    except AttributeError:
        raise ValueError(f"{place} has no function `{'.'.join(parts)}`.") from None
    source = Path(inspect.getfile(inspect.unwrap(make))).resolve()
    if not source.is_relative_to(path):
        raise ValueError(f"`{'.'.join(parts)}` of {place} comes from {source}.")
    return Peer(make, getattr(owner, "MuonDimensionNumbers", None), _name(module, path))


def _name(module: Any, path: Path) -> str:
    """Returns a package's name and version, its commit if it has one, or its path."""
    version = getattr(module, "__version__", None)
    found = subprocess.run(
        ["git", "-C", str(path.parent), "log", "-1", "--format=%h", "--", path.name],
        capture_output=True,
        text=True,
        check=False,
    )
    words = [version, found.stdout.strip()]
    if not any(words):
        words.append(str(path))
    return " ".join([module.__name__, *(word for word in words if word)])


@contextlib.contextmanager
def _put_aside(name: str) -> Iterator[None]:
    """Lets a package be imported anew, and brings back the one that was there."""
    mine = lambda key: key == name or key.startswith(f"{name}.")
    before = {key: x for key, x in sys.modules.items() if mine(key)}
    for key in before:
        del sys.modules[key]
    try:
        yield
    finally:
        for key in [key for key in sys.modules if mine(key)]:
            del sys.modules[key]
        sys.modules.update(before)


@contextlib.contextmanager
def _searched_first(folder: str) -> Iterator[None]:
    """Searches a folder for modules before all others."""
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)
