"""Figures of runs: what is drawn where, and what is refused."""

import json

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
    assert "folder of a run" in refused(output, capsys)
    assert "must end in .png" in refused([old, "--output", "figure.jpg"], capsys)


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    message = refused(["run", "--output", "figure.png"], capsys)
    assert "nanochat-jax[plot]" in message
