"""A run that was killed or told to stop ends, resumed, as one that was not, to the bit.

The processes are real, and so are the signals. They strike at a step or a save that the
test chooses, by a function put in place of the one that writes metrics or checksums.
"""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import chex
import pytest

import tiny
from nanochat_jax import cli
from nanochat_jax.config import Config
from nanochat_jax.lm.checkpoints.store import Checkpoints
from nanochat_jax.lm.tracking.console import make_display
from nanochat_jax.lm.tracking.jsonl import read_metrics
from nanochat_jax.lm.training import loop, resume
from nanochat_jax.lm.training.reporter import Reporter
from nanochat_jax.lm.training.run import make_run
from nanochat_jax.lm.training.step import compile_train_step, init_state

STEPS = {
    "total_steps": 12, "eval_interval": 0, "log_interval": 1, "checkpoint_interval": 4,
    "galore_update_freq": 5,
}  # fmt: skip
VARIANTS = {
    "muon": {},
    "muon_8bit": {"use_8bit_optim": True},
    "galore": {"use_galore": True},
    "galore_8bit": {"use_galore": True, "use_8bit_optim": True},
}
STRIKE = """
    import os, signal, sys
    from nanochat_jax import cli
    from nanochat_jax.lm.checkpoints import checksums
    from nanochat_jax.lm.tracking.jsonl import MetricsWriter

    name, step, *args = sys.argv[1:]
    write_metrics, write_checksums = MetricsWriter.write, checksums.write

    def after_a_step(self, values):
        write_metrics(self, values)
        if values["step"] == int(step):
            for each in name.split("+"):
                os.kill(os.getpid(), signal.Signals[each])

    def within_a_save(directory):
        if list(directory.glob(f"{step}.*")):
            os.kill(os.getpid(), signal.SIGKILL)
        write_checksums(directory)

    if name == "SIGKILL":
        checksums.write = within_a_save
    else:
        MetricsWriter.write = after_a_step
    sys.exit(cli.main(args))
"""


def write_config(folder, **values):
    return tiny.write_config(folder, **STEPS | values)


def train_struck(name, step, config, folder):
    """Runs `train` in a process of its own, with a signal at a step or in its save."""
    args = ["train", "--config-file", config, "--checkpoint-dir", folder]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STRIKE), name, str(step), *args],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )


def last_state(run, folder):
    return resume.restore(run, Checkpoints(folder))


def test_a_run_stopped_by_sigterm_is_resumed_to_the_same_bits(tmp_path, capsys):
    config, folder = write_config(tmp_path), tmp_path / "struck"
    done = train_struck("SIGTERM", 6, config, folder)
    assert done.returncode == 0, done.stderr
    told = "SIGTERM: stopped after step 6, which is saved. Go on with\n"
    assert f"{told}  nanochat-jax train --resume {folder}\n" in done.stdout
    assert "SIGTERM: stopping after this step" in done.stderr
    assert Checkpoints(folder).steps() == [4, 6]
    train = ["train", "--config-file", str(config), "--checkpoint-dir"]
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert "Resumed from step 6" in capsys.readouterr().out
    assert cli.main([*train, str(tmp_path / "straight")]) == 0
    run = make_run(Config.from_toml(config))
    straight = last_state(run, tmp_path / "straight")
    assert int(straight.step) == 12
    chex.assert_trees_all_equal(last_state(run, folder), straight)
    lines, others = (
        read_metrics(path / "metrics.jsonl") for path in (folder, tmp_path / "straight")
    )
    assert [x["loss"] for x in lines[1:]] == [x["loss"] for x in others[1:]]


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_its_exit_code(tmp_path):
    done = train_struck("SIGINT", 2, write_config(tmp_path), tmp_path / "run")
    assert done.returncode == 128 + signal.SIGINT
    assert "interrupted: stopped after step 2, which is saved" in done.stdout
    assert Checkpoints(tmp_path / "run").steps() == [2]


@pytest.mark.slow
def test_a_second_signal_stops_at_once_and_leaves_the_checkpoints_before(tmp_path):
    config, folder = write_config(tmp_path), tmp_path / "run"
    done = train_struck("SIGTERM+SIGINT", 10, config, folder)
    assert done.returncode == -signal.SIGINT
    assert "A second signal stops at once" in done.stderr
    assert "stopped after step" not in done.stdout
    # The save of step 8 waited for that of step 4, and may not be done.
    last = last_state(make_run(Config.from_toml(config)), folder)
    assert int(last.step) in (4, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_no_signal_changes_what_a_run_comes_to(name, tmp_path):
    config = write_config(tmp_path, **VARIANTS[name])
    run = make_run(Config.from_toml(config))
    step = compile_train_step(run)

    def train(state):
        return loop.fit(
            run, state, step, Reporter(run, int(state.step), make_display(12))
        )

    straight = train(init_state(run))
    killed, told = tmp_path / "killed", tmp_path / "told"
    assert train_struck("SIGKILL", 8, config, killed).returncode == -signal.SIGKILL
    assert [p.name for p in killed.glob("8*")] == ["8.orbax-checkpoint-tmp"]
    assert train_struck("SIGTERM", 7, config, told).returncode == 0
    for folder, last in ((killed, 4), (told, 7)):
        state = last_state(run, folder)
        assert int(state.step) == last
        chex.assert_trees_all_equal(train(state), straight)


@pytest.mark.slow
def test_steps_raised_before_the_rate_falls_give_the_longer_run_to_the_bit(tmp_path):
    short, long = (
        make_run(Config.from_toml(write_config(tmp_path, total_steps=steps)))
        for steps in (12, 16)
    )
    compiled = {
        run.config.total_steps: compile_train_step(run) for run in (short, long)
    }

    def train(run, state, stop=lambda step: False):
        reporter = Reporter(run, int(state.step), make_display(16))
        step = compiled[run.config.total_steps]
        return loop.fit(run, state, step, reporter, stop=stop)

    half = train(short, init_state(short), stop=lambda step: step == 6)
    chex.assert_trees_all_equal(train(long, half), train(long, init_state(long)))
