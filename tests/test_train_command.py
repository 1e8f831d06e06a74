"""What `train` writes beside checkpoints, and what it refuses before it writes."""

import pytest

from nanochat_jax import cli
from nanochat_jax.lm.checkpoints.store import Checkpoints
from nanochat_jax.lm.tracking.jsonl import read_metrics
from tiny import write_config

STEPS = {
    "vocab_size": 256, "dataset": "text", "total_steps": 8, "log_interval": 4,
    "checkpoint_interval": 2, "keep_last_checkpoints": 1, "keep_checkpoint_every": 4,
    "sample_interval": 4, "sample_tokens": 4, "sample_prompt": "The",
    "max_skipped_steps": 3,
}  # fmt: skip


@pytest.fixture
def train(tmp_path):
    """Returns a function that runs `train` with flags."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    path = write_config(tmp_path, **STEPS, data_path=[str(text)])

    def train(*flags):
        return cli.main(["train", "--config-file", str(path), *map(str, flags)])

    return train


def test_samples_checkpoints_and_a_trace_at_their_steps(train, tmp_path, capsys):
    folder = tmp_path / "run"
    flags = ("--profile-steps", "5:6", "--measure-optimizer")
    assert train("--checkpoint-dir", folder, *flags) == 0
    out = capsys.readouterr().out
    metrics = [m for m in read_metrics(folder / "metrics.jsonl") if "loss" in m]
    assert all(m["optimizer_share"] < 1 for m in metrics) and len(metrics) == 2
    assert "Done:   8 steps, 512 tokens in 0:0" in out
    assert f"Saved:  {folder}; try `nanochat-jax generate" in out
    assert out.count("A sample after step 4:\nThe") == 1
    assert out.count("\nA sample:\nThe") == 1
    assert "after step 8" not in out  # which is the one at the end
    assert Checkpoints(folder).steps() == [4, 8]
    assert list((folder / "profile").rglob("*.xplane.pb"))
    record = Checkpoints(folder).read_meta()
    assert record["format"] == 2
    assert record["config"]["keep_checkpoint_every"] == 4


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
    train, tmp_path, capsys, monkeypatch
):
    def read(*args):
        raise AssertionError

    folder, again = tmp_path / "run", tmp_path / "again"
    assert train("--checkpoint-dir", folder) == 0
    monkeypatch.setattr(Checkpoints, "restore", read)
    flags = ("--resume", folder / "4", "--checkpoint-dir", again)
    with pytest.raises(SystemExit) as error:
        train(*flags, "--memory-limit", "9 kB")
    assert error.value.code == 2
    assert "`memory_limit` is 9 kB" in capsys.readouterr().err
    assert not again.exists()
