"""Figures of runs: what is drawn where, and what is refused."""

import itertools
import json
from pathlib import Path

import pytest

from nanochat_jax import cli
from nanochat_jax.experiments import figures

pytest.importorskip("matplotlib")

LINES = [
    {"step": 0, "tokens": 0, "val_loss": 5.0},
    {"step": 10, "tokens": 80, "loss": 4.0, "elapsed_s": 2.0},
    {"step": 15, "tokens": 120, "val_loss": 3.5},  # an evaluation between log lines
    {"step": 20, "tokens": 160, "loss": None, "elapsed_s": 4.0},  # not finite
    {"step": 30, "tokens": 240, "loss": 3.0, "val_loss": 3.1, "elapsed_s": 1.5},
]


def drawn(lines, x):
    """Returns the points of the training line and those of the evaluations."""
    (axes,) = figures.draw_runs({"run": lines}, x).axes
    return [line.get_xydata().tolist() for line in axes.lines]


def write(folder, lines):
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return str(folder)


def refused(args, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["plot", *args])
    assert error.value.code == 2
    return capsys.readouterr().err


def test_losses_are_drawn_by_step_by_tokens_and_by_seconds():
    assert drawn(LINES, "step") == [
        [[10, 4.0], [30, 3.0]],
        [[0, 5.0], [15, 3.5], [30, 3.1]],
    ]
    assert drawn(LINES, "tokens") == [
        [[80, 4.0], [240, 3.0]],
        [[0, 5.0], [120, 3.5], [240, 3.1]],
    ]


def test_seconds_go_on_where_a_resumed_run_began_anew():
    assert drawn(LINES, "seconds") == [
        [[2.0, 4.0], [5.5, 3.0]],
        [[0.0, 5.0], [5.5, 3.1]],
    ]


def names_of(axes):
    """Returns the boxes of the names beside lines and points, without leaders."""
    from matplotlib.text import Text

    axes.figure.draw_without_rendering()
    return {text.get_text(): Text.get_window_extent(text) for text in axes.texts}


def comparison(**values):
    """Returns the summary of variants whose losses end close together."""
    losses = {"muon": 2.0, "muon_8bit": 2.001, "galore:galore_rank=8": 2.002} | values
    return {
        name: {
            "losses": [[{"step": 0, "val_loss": 9.0}, {"step": 50, "val_loss": 2.5},
                        {"step": 100, "val_loss": loss}]],
            "val_loss": loss, "val_loss_std": None, "seeds": [0],
            "total_state_bytes": 1000 * (1 + i),
        }
        for i, (name, loss) in enumerate(losses.items())
    }  # fmt: skip


@pytest.mark.parametrize(
    "draw", [figures.draw_loss_by_step, figures.draw_loss_by_bytes]
)
def test_names_stand_apart_and_those_of_lost_runs_in_the_title(draw):
    figure = draw(comparison(lost=None))
    title = figure.axes[0].get_title()
    assert "one seed" in title and title.endswith("diverged: lost")
    for axes in figure.axes:
        boxes = names_of(axes)
        assert boxes.keys() == {"muon", "muon_8bit", "galore:\ngalore_rank=8"}
        for one, other in itertools.combinations(boxes.values(), 2):
            assert not one.overlaps(other)


def test_a_comparison_shows_the_end_and_ratios_to_float32_muon():
    above, below = figures.draw_loss_by_step(comparison()).axes
    assert above.get_ylim()[0] > 1.9 and above.get_ylim()[1] < 2.6
    ratios = {tuple(line.get_ydata()) for line in below.lines}
    assert (1.0, 1.0, 1.0) in ratios
    assert (1.0, 1.0, pytest.approx(2.001 / 2.0)) in [*ratios]
    for part in ("color", "marker"):
        assert len({getattr(line, f"get_{part}")() for line in below.lines}) == 3


@pytest.mark.parametrize("x", ["step", "tokens", "seconds"])
def test_runs_are_drawn_together_into_a_png(x, tmp_path, capsys):
    runs = [write(tmp_path / name, LINES) for name in ("a", "b")]
    output = tmp_path / "figures" / "both.png"
    assert cli.main(["plot", *runs, "--output", str(output), "--x", x]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in output.parent.iterdir()] == ["both.png"]
    assert str(output) in capsys.readouterr().out


def test_the_figure_has_a_name_if_none_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plot", write(tmp_path / "run", LINES)]) == 0
    assert (tmp_path / "loss.png").exists()


def test_a_figure_that_cannot_be_written_leaves_the_one_before(tmp_path):
    class Broken:
        def savefig(self, path, **_):
            path.write_bytes(b"half of it")
            raise OSError("disk full")

    before = tmp_path / "loss.png"
    before.write_bytes(b"whole")
    with pytest.raises(OSError, match="disk full"):
        figures.save(Broken(), before)
    assert before.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [before]


def test_the_legend_has_folder_names_or_paths_where_they_are_the_same(
    tmp_path, monkeypatch
):
    names = []
    monkeypatch.setattr(
        figures, "draw_runs", lambda runs, x: names.extend(runs) or FigureStub()
    )
    same = [write(tmp_path / part / "run", LINES) for part in ("x", "y")]
    other = f"{write(tmp_path / 'other', LINES)}/metrics.jsonl"
    output = str(tmp_path / "figure.png")
    assert cli.main(["plot", *same, other, "--output", output]) == 0
    assert names == [*same, "other"]


class FigureStub:
    def savefig(self, path, **_):
        path.touch()


def test_all_files_that_cannot_be_drawn_are_named_at_once(tmp_path, capsys):
    good, empty = write(tmp_path / "good", LINES), write(tmp_path / "empty", [])
    output = tmp_path / "figure.png"
    args = [good, empty, str(tmp_path / "none"), "--output", str(output)]
    message = refused(args, capsys)
    assert "empty/metrics.jsonl: there are no metrics" in message
    assert "none/metrics.jsonl: no such file" in message
    assert "good" not in message
    assert not output.exists()


def test_what_cannot_be_drawn_is_refused(tmp_path, capsys):
    old = write(tmp_path / "old", [{"step": 1, "loss": 2.0}])
    output = ["--output", str(tmp_path / "figure.png")]
    assert "no losses by tokens: ['old']" in refused(
        [old, *output, "--x", "tokens"], capsys
    )
    assert "`RUN` is required" in refused(output, capsys)
    assert "must end in .png" in refused([old, "--output", "figure.jpg"], capsys)
    below = f"{old}/metrics.jsonl/figure.png"
    assert "metrics.jsonl is a file" in refused([old, "--output", below], capsys)


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    message = refused(["run", "--output", "figure.png"], capsys)
    assert "nanochat-jax[plot]" in message


def test_the_numbers_of_the_readme_figure_are_those_of_the_results():
    root = Path(__file__).parents[1]
    numbers = json.loads((root / "benchmarks/readme_figure.json").read_text())
    results = (root / "docs/RESULTS.md").read_text().splitlines()
    for row in numbers["loss"]["rows"].values():
        whole, ratio = f"| {row['state_mb']:.2f} |", row["ratio"]
        told = [f"| {ratio:.3f} ", "| 1 |"][: 1 + (ratio == 1)]
        assert any(x.endswith(whole) and any(t in x for t in told) for x in results)
    ours = [name for name in numbers["step"]["bytes"] if "optax" not in name]
    assert len(ours) == 4
    for name in ours:
        total = f"| {sum(numbers['step']['bytes'][name].values()) / 1e6:.0f} |"
        assert any(total in line for line in results)
