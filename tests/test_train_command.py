"""What `train` prints and writes, how it is stopped and resumed, what it refuses."""

import contextlib
import io
import re
import shlex
import signal

import pytest
from rich.console import Console

from nanochat_jax import cli
from nanochat_jax.commands import train as command
from nanochat_jax.lm.checkpoints.store import Checkpoints
from nanochat_jax.lm.tracking.jsonl import MetricsWriter, read_metrics
from tiny import write_config

STEPS = {
    "vocab_size": 256, "dataset": "text", "total_steps": 8, "log_interval": 4,
    "checkpoint_interval": 2, "keep_last_checkpoints": 1, "keep_checkpoint_every": 4,
    "sample_interval": 4, "sample_tokens": 4, "sample_prompt": "The",
    "max_skipped_steps": 3,
}  # fmt: skip


def write_files(folder):
    """Writes settings and data, and returns the path of the settings."""
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    return write_config(folder, **STEPS, data_path=[str(text)])


@pytest.fixture
def train(tmp_path):
    """Returns a function that runs `train` with flags."""
    path = write_files(tmp_path)

    def train(*flags):
        return cli.main(["train", "--config-file", str(path), *map(str, flags)])

    return train


def captured(*words, columns=None):
    """Returns the exit code of a command and what it prints; piped without columns."""

    def console(**kwargs):
        return Console(force_terminal=True, width=columns, _environ={}, **kwargs)

    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        if columns:
            patch.setattr(command, "Console", console)
        try:
            code = cli.main([*map(str, words)])
        except SystemExit as ended:
            code = ended.code
    return code, out.getvalue()


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A run in four chapters, in a folder where one was killed before its first save.

    Stopped by Ctrl-C after step 4 on a terminal of 80 columns; resumed by the command
    that was printed, in a pipe; started once more when done, at two widths.
    """
    folder = tmp_path_factory.mktemp("story")
    config, run = write_files(folder), folder / "run"
    (run / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"st')
    start = ("train", "--config-file", config, "--checkpoint-dir", run)
    start = (*start, "--resume", "auto", "--measure-optimizer")
    write = MetricsWriter.write

    def strike(self, values):
        write(self, values)
        if values["step"] == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsWriter, "write", strike)
        stopped = captured(*start, columns=80)
    [line] = [x for x in stopped[1].splitlines() if "train --resume" in x]
    _, *words = shlex.split(line)
    resumed = captured(*words, "--profile-steps", "5:6")
    done = [captured(*start, columns=columns) for columns in (80, 140)]
    return run, stopped, resumed, done


def lines_of(text):
    """Returns the lines of a terminal without its control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).splitlines()


def too_long(text, columns):
    """Returns lines over the width, but for commands and paths, which stay whole."""
    told = [line for line in lines_of(text) if "/" not in line]
    assert told
    return [line for line in told if len(line) > columns]


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(story):
    run, (code, out), _, _ = story
    assert code == 130
    assert "Compiling the training step" in out
    told = "\n".join(lines_of(out))
    assert "SIGINT: stopping after this step. A second signal stops" in told
    end = "interrupted: stopped after step 4, which is saved. Go on with\n"
    assert told.endswith(f"{end}  nanochat-jax train --resume {run}")
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h")  # the cursor is back
    assert too_long(out, 80) == []


def test_the_printed_command_goes_on_with_the_stored_settings(story):
    run, _, (code, out), _ = story
    assert code == 0 and "\x1b" not in out
    for text in (
        "Compiling the training step\n",
        "Resumed from step 4.",
        "Done:   8 steps, 512 tokens, the last 4 steps in 0:0",
        "Loss: line training, ● held-out text\n",
        "  AdamW, float32",
        f"Next:   nanochat-jax generate --checkpoint {run}\n",
        f"        nanochat-jax train --resume {run} --total-steps 16\n",
    ):
        assert text in out
    assert Checkpoints(run).read_meta()["config"]["measure_optimizer"]


def test_samples_checkpoints_and_a_trace_at_their_steps(story):
    run, (_, before), (_, after), _ = story
    metrics = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 4, 8]
    assert all(m["optimizer_share"] < 1 for m in metrics if "loss" in m)
    assert "\n".join(lines_of(before)).count("A sample after step 4:\nThe") == 1
    assert after.count("A sample:\nThe") == 1
    assert "after step 8" not in after  # which is the one at the end
    assert Checkpoints(run).steps() == [4, 8]
    assert list((run / "profile").rglob("*.xplane.pb"))
    record = Checkpoints(run).read_meta()
    assert record["format"] == 2
    assert record["config"]["keep_checkpoint_every"] == 4


def test_a_run_that_is_done_says_so_and_shows_its_chart_again(story):
    *_, done = story
    for columns, (code, out) in zip((80, 140), done, strict=True):
        assert code == 0
        assert "All 8 steps of this run are done already." in out
        assert "Loss: line training" in out and "Next:" in out
        assert too_long(out, min(columns, 100)) == []


def test_tensorboard_has_the_metrics(train, tmp_path):
    pytest.importorskip("tensorboardX")
    folder = tmp_path / "run"
    assert train("--checkpoint-dir", folder, "--tensorboard") == 0
    assert list((folder / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(
    "flags", [("--tensorboard",), ("--wandb", "p"), ("--profile-steps", "1:2")]
)
def test_what_needs_a_folder_asks_for_one(train, capsys, flags):
    with pytest.raises(SystemExit) as error:
        train(*flags)
    assert error.value.code == 2
    assert "Give a folder by `--checkpoint-dir`" in capsys.readouterr().err


def test_a_folder_is_not_made_for_steps_that_are_none(train, tmp_path, capsys):
    folder = tmp_path / "run"
    with pytest.raises(SystemExit):
        train("--checkpoint-dir", folder, "--profile-steps", "3")
    assert "A:B" in capsys.readouterr().err
    assert not folder.exists()


def test_a_resumed_run_beyond_its_limit_is_refused_before_its_state_is_read(
    story, tmp_path, capsys, monkeypatch
):
    def read(*args):
        raise AssertionError

    run, again = story[0], tmp_path / "again"
    monkeypatch.setattr(Checkpoints, "restore", read)
    flags = ("--resume", run / "4", "--checkpoint-dir", again)
    message = refused(capsys, *flags, "--memory-limit", "9 kB")
    assert "`memory_limit` is 9 kB" in message
    assert not again.exists()


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as error:
        cli.main(["train", *map(str, flags)])
    assert error.value.code == 2
    return capsys.readouterr().err


def test_what_a_stored_run_may_not_change_is_refused_in_one_message(story, capsys):
    run, *_ = story
    message = refused(capsys, "--resume", run, "--lr", 0.5, "--dim", 64)
    assert "config.lr: stored 0.02, now 0.5" in message
    assert "config.dim: stored 32, now 64" in message
    assert "leaving out the flags or the `--config-file` that change them" in message


def test_steps_may_be_raised_and_not_lowered_below_those_done(story, capsys):
    run, *_ = story
    assert "Raise `--total-steps`" in refused(capsys, "--resume", run)
    lower = refused(capsys, "--resume", run, "--total-steps", 6)
    assert "of step 8, and the run has 6 steps" in lower


def test_where_there_is_no_checkpoint_auto_is_named(tmp_path, capsys):
    none = tmp_path / "none"
    message = refused(capsys, "--resume", none)
    assert f"{none}, and no checkpoint is there." in message
    assert f"`--resume auto --checkpoint-dir {none}` starts a run" in message
    assert "Give that folder too" in refused(capsys, "--resume", "auto")


def test_ctrl_c_before_the_first_step_says_what_is_saved(
    story, train, tmp_path, capsys, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "compile_train_step", interrupt)
    new, run = tmp_path / "new", story[0]
    assert train("--checkpoint-dir", new) == 130
    assert "interrupted. Nothing is saved yet. Start with the same comma" in (
        capsys.readouterr().err
    )
    assert train() == 130
    assert "for want of `--checkpoint-dir`" in capsys.readouterr().err
    flags = ("--resume", run, "--total-steps", 9, "--threads", 1)
    assert cli.main(["train", *map(str, flags)]) == 130
    # The printed command of a checkpoint would not have the new `--total-steps`.
    again = "interrupted. Give the same command again: it goes on from what is saved."
    assert again in capsys.readouterr().err


def test_freed_memory_goes_back_to_the_system_before_the_first_step(train, monkeypatch):
    calls = []

    def interrupt(*_, **__):
        calls.append("fit")
        raise KeyboardInterrupt

    given_back = lambda: calls.append("give back")
    monkeypatch.setattr(command.run_memory, "give_back_memory", given_back)
    monkeypatch.setattr(command, "fit", interrupt)
    assert train() == 130
    assert calls == ["give back", "fit"]
