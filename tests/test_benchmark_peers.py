"""The benchmark times the peer it is given, and leaves the installed packages alone."""

import importlib
import sys
from pathlib import Path

import optax
import pytest

PACKAGE = {
    "optax/__init__.py": "from optax import contrib\n__version__ = '9.9'\n",
    "optax/contrib.py": (
        "import optax\n"
        "class MuonDimensionNumbers:\n"
        "    def __init__(self, *axes): self.axes = axes\n"
        "def muon(rate, muon_weight_dimension_numbers):\n"
        "    return optax.__version__, rate, muon_weight_dimension_numbers\n"
    ),
    "mine.py": (
        "import optax\ndef muon(rate): return optax.sgd(rate)\nfrom optax import adam\n"
    ),
}


@pytest.fixture(scope="module")
def peers():
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("peers")
    finally:
        sys.path.remove(folder)


@pytest.fixture
def checkout(tmp_path):
    for name, text in PACKAGE.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_a_package_is_imported_beside_the_installed_one(peers, checkout):
    peer = peers.load(str(checkout / "optax"))
    version, rate, axes_of = peer.muon(0.5)
    assert (version, rate, axes_of({"w": 1})["w"].axes) == ("9.9", 0.5, (-2, -1))
    assert peer.version == "optax 9.9"
    assert sys.modules["optax"] is optax
    assert sys.modules["optax.contrib"] is optax.contrib
    assert peers.installed().version == f"optax {optax.__version__}"


def test_a_file_is_named_by_its_path_and_has_the_installed_packages(peers, checkout):
    peer = peers.load(str(checkout / "mine.py"))
    assert isinstance(peer.muon(0.5), optax.GradientTransformation)
    assert peer.version == f"mine {checkout / 'mine.py'}"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("mine.py:adam", "`adam` of .*mine.py comes from "),
        ("mine.py:none", "has no function `none`"),
        ("absent", "must be a Python file or a package"),
    ],
)
def test_what_is_no_peer_is_refused(peers, checkout, spec, said):
    with pytest.raises(ValueError, match=said):
        peers.load(str(checkout / spec))
