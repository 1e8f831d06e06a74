"""The notebooks run from top to bottom, and are stored without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
IDS = [path.stem for path in BOOKS]


def printed(book):
    """Returns all that the cells of a notebook wrote."""
    return "".join(
        output.get("text", "")
        for cell in book.cells
        for output in cell.get("outputs", [])
    )


def test_there_are_two_notebooks():
    assert IDS == ["inside_the_state", "swap_the_optimizer"]


@pytest.mark.parametrize("path", BOOKS, ids=IDS)
def test_a_notebook_is_stored_without_outputs(path):
    book = nbformat.read(path, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (
            "swap_the_optimizer",
            ["nj.muon, 8 bits", "128x128", "bytes for the matrices"],
        ),
        ("inside_the_state", ["int8", "keeps 9", "weights", "13.48 GB"]),
    ],
)
def test_a_notebook_runs_from_top_to_bottom(name, shown, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MPLBACKEND", "agg")
    book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    client = NotebookClient(book, timeout=600, resources={"metadata": {"path": ROOT}})
    client.execute()  # raises what a cell raises
    assert [text for text in shown if text not in printed(book)] == []
