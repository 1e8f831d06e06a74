"""The examples run, and show what they say."""

import ast
import runpy
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def run(name):
    [path] = [path for path in FILES if path.stem == name]
    return runpy.run_path(str(path))["main"]()


def test_quickstart_fits_with_less_and_less_state(capsys):
    results = run("quickstart")
    printed = capsys.readouterr().out
    for result in results.values():
        assert result["last_loss"] < 0.01 * result["first_loss"]
        assert f"{result['state_bytes']:,} bytes" in printed
    held = {name: result["state_bytes"] for name, result in results.items()}
    full = held["Muon, float32"]
    assert full == 4 * (2 * 128 * 256) + 4  # the momentum, and the schedule's count
    assert held["8-bit Muon"] < 0.26 * full
    assert held["GaLore"] < 0.38 * full
    assert held["GaLore + 8-bit"] < 0.09 * full


def test_flax_train_loop_learns_with_the_state_it_planned(capsys):
    result = run("flax_train_loop")
    assert result["last_loss"] < 0.01 * result["first_loss"]
    held = f"{result['state_bytes']:,}"
    assert f"state {held} bytes, as planned: {held}" in capsys.readouterr().out
    adam = 2 * 4 * (31 * 32 + 128 * 31 + 2 * 64 + 2 * 128 + 31)
    muon = 4 * (64 * 128 + 128 * 128)
    assert 0.25 * muon < result["state_bytes"] - adam < 0.26 * muon


def test_linen_train_state_learns_and_names_what_is_not_projected(capsys):
    result = run("linen_train_state")
    assert result["last_loss"] < 0.01 * result["first_loss"]
    full = 4 * (2 * 128 + 2 * 128 * 128) + 8 * (3 * 128 + 128 * 3 + 3)
    assert result["state_bytes"] < 0.15 * full
    printed = capsys.readouterr().out
    assert f"FP32 Muon + AdamW {full:,}" in printed
    assert "left at full rank: ['Dense_0']['kernel']" in printed


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_to_run_it(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 80
    assert f"`python examples/{path.name}`" in (
        ast.get_docstring(ast.parse(source)) or ""
    )
    assert f"test_{path.stem}_" in Path(__file__).read_text(encoding="utf-8")
