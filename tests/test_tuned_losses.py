"""The search of `benchmarks/tuned_losses.py`, on losses that cost nothing."""

import importlib
from pathlib import Path

import pytest

AXES = {"a": (1, 2, 3, 4, 5), "b": (10, 20, 30)}
START = {"a": 1, "b": 10}


@pytest.fixture
def tuned_losses(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("tuned_losses")


@pytest.mark.parametrize(("budget", "best"), [(1, START), (99, {"a": 4, "b": 20})])
def test_a_search_takes_the_best_that_its_budget_lets_it_see(
    tuned_losses, budget, best
):
    seen = []

    def losses(settings):
        seen.extend(settings)
        return [abs(x["a"] - 4) + abs(x["b"] - 20) for x in settings]

    assert tuned_losses.descend(START, AXES, budget, losses) == best
    assert len(seen) <= budget
    assert all(seen.count(x) == 1 for x in seen)


def test_contenders_come_after_those_they_build_on(tuned_losses):
    names = tuned_losses._with_parents(["cautious, floors, average"])
    assert names == ["Muon", "cautious, floors", "cautious, floors, average"]
