"""The command line: what it prints, what it refuses and with which exit code."""

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from nanochat_jax import cli, describe
from nanochat_jax.commands.usage import flags, help
from nanochat_jax.commands.usage.registry import COMMANDS
from nanochat_jax.config import Config
from nanochat_jax.lm.data.token_file import write_tokens
from nanochat_jax.lm.planning import run_memory
from nanochat_jax.lm.tracking.jsonl import read_metrics
from tiny import write_config

SETTINGS = {
    "vocab_size": 256, "total_steps": 6, "log_interval": 3, "use_8bit_optim": True,
    "use_galore": True, "galore_update_freq": 4, "ns_steps": 1,
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path, **SETTINGS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run with checkpoints of steps 3 and 6, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    args = ["--config-file", write_config(folder, **SETTINGS), "--checkpoint-dir"]
    args += [folder / "run", "--checkpoint-interval", 3]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["train", *map(str, args)]) == 0
    return folder / "run", out.getvalue()


def refused(args, capsys):
    """Runs a command that must end with exit code 2; returns its one message."""
    with pytest.raises(SystemExit) as error:
        cli.main([str(arg) for arg in args])
    assert error.value.code == 2
    return capsys.readouterr().err


def test_train_prints_the_optimizer_and_writes_checkpoints_and_metrics(trained):
    folder, out = trained
    assert "Muon variant:      GaLore 2 + 8-bit Muon" in out
    assert "Memory reduction:  " in out
    assert "momentum int8" in out and "basis int4" in out
    assert "step 6/6" in out
    assert "Optimizer state: 0.0 MB; FP32 Muon + AdamW: 0.1 MB." in out
    steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl")]
    assert steps == [0, 3, 6]
    assert (folder / "6").is_dir()


def test_a_run_resumes_where_it_stopped_and_flags_override_the_file(
    config, trained, tmp_path, capsys
):
    folder, _ = trained
    args = [
        "train", "--config-file", str(config), "--checkpoint-interval", "3",
        "--checkpoint-dir",
    ]  # fmt: skip
    resume = ["--resume", str(folder / "3")]
    assert cli.main([*args, str(tmp_path / "again"), *resume]) == 0
    out = capsys.readouterr().out
    assert "Resumed from step 3" in out
    assert "Done:   6 steps, 384 tokens, the last 3 steps in 0:0" in out
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == [
        "6", "metrics.jsonl",
    ]  # fmt: skip
    message = refused([*args, folder, *resume], capsys)
    assert "later checkpoints are there: [6]" in message


def test_plan_prints_one_json_object_all_but_the_peak_from_shapes(
    config, capsys, monkeypatch
):
    args = ["plan", "--config-file", str(config), "--json"]
    assert cli.main(args) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["variant"] == "galore_8bit"
    assert plan["matrix"].keys() == {
        "params", "state_bytes", "fp32_muon_bytes", "reduction"
    }  # fmt: skip
    assert plan["total"].keys() == {
        "params", "state_bytes", "fp32_muon_adamw_bytes", "reduction"
    }  # fmt: skip
    assert plan["update"].keys() == {"temp_bytes", "argument_bytes", "output_bytes"}
    assert plan["matrix"]["fp32_muon_bytes"] == 4 * plan["matrix"]["params"]
    assert [group["label"] for group in plan["groups"]] == [
        "matrix", "embedding", "vector"
    ]  # fmt: skip
    assert sum(g["params"] for g in plan["groups"]) == plan["total"]["params"]
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    assert cli.main([*args, "--no-compile"]) == 0
    shapes = json.loads(capsys.readouterr().out)
    assert "peak" in shapes.pop("needs_compiling")
    assert shapes.pop("step").items() < plan["step"].items()
    assert shapes == {key: plan[key] for key in shapes}
    assert cli.main([*args[:-1], "--no-compile"]) == 0
    out = capsys.readouterr().out
    assert "Not known without compiling: temporaries, peak" in out
    assert max(map(len, out.splitlines())) <= 80


def test_plan_describes_the_parameters(config, capsys):
    args = ["plan", "--config-file", str(config), "--parameters"]
    run = run_memory.abstract_run(Config.from_toml(config))
    described = describe(run.tx, run.params)
    assert cli.main(args) == 0
    assert capsys.readouterr().out == f"{described}\n"
    assert cli.main([*args, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["warnings"] == [*described.warnings]
    assert [leaf["path"] for leaf in told["leaves"]] == [
        leaf.path for leaf in described.leaves
    ]


def test_plan_in_words_compares_the_ranks(config, capsys):
    assert cli.main(["plan", "--config-file", str(config)]) == 0
    out = capsys.readouterr().out
    for text in ("Parameter groups", "Matrix state by GaLore rank", "384", "blocks.*."):
        assert text in out


def test_a_raw_uint32_file_trains(config, tmp_path, capsys):
    path = tmp_path / "tokens.bin"
    rng = np.random.default_rng(0)
    rng.integers(0, 256, 5000, dtype=np.uint32).astype("<u4").tofile(path)
    args = ["--dataset", "tokens", "--data-path", str(path)]
    assert cli.main(["train", "--config-file", str(config), *args]) == 0
    assert "step 6/6" in capsys.readouterr().out


def test_what_cannot_be_used_is_refused_and_nothing_is_written(
    config, tmp_path, capsys
):
    folder = tmp_path / "run"
    train = ["train", "--config-file", config, "--checkpoint-dir", folder]

    def told(*args):
        message = refused([*train, *args], capsys)
        assert not folder.exists()
        return message

    assert "`galore_rank` must be at least 1, got 0" in told("--galore-rank", 0)
    assert "`galore_update_freq` must be at least 1, got 0" in told(
        "--galore-update-freq", 0
    )
    missing = ["--dataset", "text", "--data-path", tmp_path / "none.txt"]
    assert "none.txt" in told(*missing)
    tokens = tmp_path / "tokens.bin"
    write_tokens(tokens, np.full(4000, 999), vocab_size=1000)
    (tmp_path / "tokens.bin.json").unlink()
    message = told("--dataset", "tokens", "--data-path", tokens)
    assert "999" in message
    assert "from 0 to 255" in message
    assert "no checkpoint is there" in told("--resume", tmp_path / "nowhere")
    assert "nothing is left" not in told("--threads", 10_000)


def test_a_typo_and_a_missing_file_name_what_is_known(config, tmp_path, capsys):
    config.write_text(config.read_text().replace("galore_rank", "galor_rank"))
    message = refused(["train", "--config-file", config], capsys)
    assert "unknown key `galor_rank`. Did you mean `galore_rank`?" in message
    message = refused(["plan", "--config-file", tmp_path / "none.toml"], capsys)
    assert "none.toml: no such file" in message
    message = refused(["train", "--config-file", config, "--galor-rank", 4], capsys)
    assert "galor" in message


def test_a_damaged_checkpoint_is_refused(config, trained, tmp_path, capsys):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    for path in (folder / "3" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    before = sorted(folder.rglob("*"))
    train = ["train", "--config-file", config, "--resume", folder / "3"]
    message = refused(train, capsys)
    assert "damaged checkpoint" in message
    assert sorted(folder.rglob("*")) == before


def test_a_gpu_that_is_not_there_is_an_error(config):
    command = [sys.executable, "-m", "nanochat_jax", "train", "--device", "gpu"]
    done = subprocess.run(
        [*command, "--config-file", str(config)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "finds no such device" in done.stderr
    assert "cuda13" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_help_describes_every_flag_once_within_the_width(
    command, flag, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([command, flag]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    kind = COMMANDS[command].load()
    described = help.descriptions(kind)
    for field, flag in flags.flags_of(kind).items():
        assert described[field]
        word = flag.name.removeprefix("--")
        name = rf"^  (--(\[no-\])?)?{re.escape(word)}(\.\.\.)?( |$)"
        assert sum(bool(re.search(name, line)) for line in lines) == 1, field


def test_help_has_the_values_of_the_file_and_groups(config, capsys):
    assert cli.main(["train", "--config-file", str(config), "-h"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"--galore-rank.*\n.*\[8\]", out, re.DOTALL)
    assert "--[no-]use-galore " in out and "low-rank" in out.replace("\n", "")
    for title in help.GROUPS.values():
        assert f"\n{title}\n" in out
    fields = {field.name for field in dataclasses.fields(COMMANDS["train"].load())}
    assert help.GROUPS.keys() <= fields


@pytest.mark.parametrize(("given", "used"), [(None, "1"), ("3", "3")])
def test_lapack_has_one_thread_unless_told_otherwise(given, used, monkeypatch, capsys):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", given)
    assert cli.main(["--help"]) == 0
    assert os.environ["OPENBLAS_NUM_THREADS"] == used


def test_lines_that_checkpoints_log_are_not_shown(capsys):
    logging.getLogger("absl").setLevel(logging.INFO)
    assert cli.main(["--help"]) == 0
    assert logging.getLogger("absl").level == logging.ERROR


def test_help_names_every_command_and_what_it_does(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    for command in COMMANDS.values():
        assert command.summary == help.paragraphs(command.load())[0]
