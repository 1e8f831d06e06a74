"""Two processes train as one does, stop together, and say what is wrong.

They are real processes on this machine, over gloo.
"""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

import tiny
from nanochat_jax import cli
from nanochat_jax.lm.checkpoints.store import Checkpoints
from nanochat_jax.lm.runtime import watchdog
from nanochat_jax.lm.tracking.jsonl import read_metrics

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "total_steps": 12, "eval_interval": 0, "log_interval": 1, "checkpoint_interval": 4,
    "sample_tokens": 0,
}  # fmt: skip
STRUCK = """
    import os, signal, sys
    from nanochat_jax import cli
    from nanochat_jax.lm.runtime.stop import SharedStop

    step, *args = sys.argv[1:]
    ask = SharedStop.__call__

    def struck(self, done):
        if done == int(step):
            os.kill(os.getpid(), signal.SIGTERM)
        return ask(self, done)

    SharedStop.__call__ = struck
    sys.exit(cli.main(args))
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(args, script=None, devices=1, **env):
    """Starts a process with one device or more."""
    program = ["-c", textwrap.dedent(script)] if script else ["-m", "nanochat_jax.cli"]
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen(
        [sys.executable, *program, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **settings, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(running):
    """Waits for processes; returns for each its exit code and what it printed."""
    running = list(running)
    told = [process.communicate(timeout=600) for process in running]
    codes = [process.returncode for process in running]
    return [(code, *text) for code, text in zip(codes, told, strict=True)]


def together(train, script, step, devices=1):
    """Trains in two processes, the second of which gets SIGTERM at a step."""
    port = free_port()
    flags = lambda i: ["--coordinator", f"localhost:{port}", "--num-processes", 2]
    return ends(
        start([*before, *train, *flags(i), "--process-id", i], code, devices)
        for i, (before, code) in enumerate([([-1], script), ([step], script)])
    )


def losses(folder):
    return {
        x["step"]: x["loss"]
        for x in read_metrics(folder / "metrics.jsonl")
        if "loss" in x
    }


def test_a_jax_that_keeps_its_client_elsewhere_is_named(monkeypatch):
    assert watchdog.coordination_client() is None
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.delattr("jax._src.distributed.global_state")
    with pytest.raises(RuntimeError, match=r"`jax\._src\.distributed`.* one process"):
        watchdog.coordination_client()


def test_a_signal_to_one_of_two_processes_stops_both_at_a_step(tmp_path):
    config, folder = tiny.write_config(tmp_path, **SETTINGS), tmp_path / "two"
    train = ["train", "--config-file", config, "--checkpoint-dir"]
    first, second = together([*train, folder, "--mesh", "fsdp=2"], STRUCK, 5)
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "SIGTERM: stopped after step 6, which is saved" in first[1]
    said = second[1].splitlines()
    assert [line for line in said if not line.startswith("[Gloo]")] == []
    assert Checkpoints(folder).steps() == [4, 6]
    # One process goes on, on one device, as one that did all of it.
    train = [str(x) for x in train]
    assert cli.main([*train, str(folder), "--resume", str(folder)]) == 0
    assert cli.main([*train, str(tmp_path / "one")]) == 0
    two, one = losses(folder), losses(tmp_path / "one")
    assert two.keys() == one.keys() and max(two) == 12
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, abs=1e-5)
