"""The site keeps up with the package, and its pictures with their scripts."""

import importlib
import re
import sys
from pathlib import Path

import pytest

import nanochat_jax as nj

DOCS = Path(__file__).parents[1] / "docs"


def documented():
    """Returns the objects that the API pages name, by their path."""
    pages = [path.read_text(encoding="utf-8") for path in DOCS.glob("api/*.md")]
    return set(re.findall(r"^::: (\S+)$", "\n".join(pages), re.M))


def resolved(path):
    """Returns what a path names, or `None`."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name, None)


def test_the_api_pages_have_every_public_name():
    shown = [resolved(path) for path in documented()]
    missing = [
        name for name in nj.__all__ if all(getattr(nj, name) is not x for x in shown)
    ]
    assert missing == []


def test_every_page_is_in_the_navigation():
    config = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert pages == set(re.findall(r"[\w/]+\.md", config))


def picture(name, folder, monkeypatch):
    """Draws a picture into a folder; returns its numbers."""
    monkeypatch.syspath_prepend(DOCS / "pictures")
    return importlib.import_module(name).main(folder)


@pytest.fixture(autouse=True)
def modules_of_pictures():
    """Forgets the scripts, whose names are not those of a package."""
    yield
    for path in DOCS.glob("pictures/*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.slow
def test_newton_schulz_brings_the_values_of_the_picture_near_one(tmp_path, monkeypatch):
    values = picture("singular_values", tmp_path, monkeypatch)
    before = values.pop("before")
    assert before[0] > 20 * before[-1]
    for after in values.values():
        assert 0.6 < after[-1] <= after[0] < 1.2
    assert (tmp_path / "singular_values.svg").stat().st_size > 10_000


@pytest.mark.slow
def test_the_picture_of_codecs_shows_what_the_page_says(tmp_path, monkeypatch):
    numbers = picture("codec_errors", tmp_path, monkeypatch)
    bias = numbers.pop("largest bias")
    assert bias["stochastic"] < 0.1 < bias["to nearest"]
    norm, entry = numbers.values()
    assert max(norm["Int8"].values()) < 0.02
    assert max(norm["Normal4"].values()) < min(norm["Int4"].values())
    assert all(entry["Dynamic8"][name] < entry["Int8"][name] for name in entry["Int8"])
    page = (DOCS / "how/eight_bits.md").read_text(encoding="utf-8")
    for table in (norm, entry):
        for codec, errors in table.items():
            row = "".join(f"{100 * error:7.2f} %" for error in errors.values())
            assert f"{codec:10}{row}" in page
    assert {path.name for path in tmp_path.iterdir()} == {
        "codec_errors.svg",
        "rounding.svg",
    }


@pytest.mark.slow
def test_the_picture_of_bases_shows_what_the_page_says(tmp_path, monkeypatch):
    numbers = picture("basis_energy", tmp_path, monkeypatch)
    aged = numbers.pop("aged")
    for energies in numbers.values():
        kept = list(energies.values())
        assert kept == sorted(kept)
        assert kept[-1] == pytest.approx(1, abs=1e-4)
        assert energies[32] > 0.8  # a quarter of the directions
    for energies in aged.values():
        assert sum(energies[-10:]) / 10 < energies[0]
    assert (tmp_path / "basis_energy.svg").exists()
