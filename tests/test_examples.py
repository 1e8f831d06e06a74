"""The examples run, and show what they say."""

import ast
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from nanochat_jax.commands import command_of
from nanochat_jax.lm import huggingface

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


def test_nnx_optimizer_learns_with_the_state_it_planned(capsys):
    result = run("nnx_optimizer")
    assert result["last_loss"] < 0.05 * result["first_loss"]
    held = f"{result['state_bytes']:,}"
    assert f"state {held} bytes, as planned: {held}" in capsys.readouterr().out
    full = 4 * (2 * 64 * 128) + 8 * (128 + 64 + 64 + 64 * 16 + 16)
    assert result["state_bytes"] < 0.5 * full


def test_equinox_train_learns_with_its_matrices_in_8_bits():
    pytest.importorskip("equinox", reason="equinox is missing: `make test` has it")
    result = run("equinox_train")
    assert result["last_loss"] < 1e-3 * result["first_loss"]
    stored = 2 * (64 * 64 + 2 * 64)  # scales are bfloat16
    small = 4 * (2 * 32 + 64)  # under `min_size`: frequencies, and the last layer
    adam = 2 * 4 * (64 + 64 + 1)
    assert result["state_bytes"] == stored + small + adam + 11 * 4  # and the counts


def test_backward_nnx_learns():
    result = run("backward_nnx")
    assert result["last_loss"] < 0.01 * result["first_loss"]


def test_backward_equinox_learns_with_weights_in_bfloat16_and_further_bits():
    pytest.importorskip("equinox", reason="equinox is missing: `make test` has it")
    result = run("backward_equinox")
    assert result["last_loss"] < 0.1 * result["first_loss"]
    short = [x.astype("bfloat16") for x in jax.tree.leaves(result["weights"])]
    pairs = zip(short, jax.tree.leaves(result["weights"]), strict=True)
    assert any((x != y).any() for x, y in pairs)


def test_linen_attention_learns_to_repeat(capsys):
    """With no word about its axes: that is the task of `test_copy_task`."""
    result = run("linen_attention")
    assert result["last_loss"] < 0.05
    table = capsys.readouterr().out
    for name in ("query", "key", "value"):
        assert re.search(rf"/{name}/kernel +64x4x16 +64x64 +matrix", table)
    assert re.search(r"/out/kernel +4x16x64 +64x64 +matrix", table)


def test_nnx_cnn_learns_with_kernels_seen_as_matrices(capsys):
    result = run("nnx_cnn")
    assert result["last_loss"] < 0.5 * result["first_loss"]
    assert re.search(r"second/kernel +3x3x16x32 +144x32", capsys.readouterr().out)


def test_lora_learns_with_state_for_its_adapters_only(capsys):
    result = run("lora")
    assert result["last_loss"] < 0.02 * result["first_loss"]
    assert result["frozen"]
    assert result["params"] == 2 * 4 * (32 + 128)
    assert "up/kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bits", "most"), [("8", 0.3), pytest.param("4", 0.25, marks=pytest.mark.slow)]
)
def test_finetune_hf_learns_and_writes_a_folder_that_is_a_model(bits, most, tmp_path):
    [path] = [path for path in FILES if path.stem == "finetune_hf"]
    args = ["--bits", bits, "--output", str(tmp_path / "out")]
    result = runpy.run_path(str(path))["main"](args)
    assert result["last_loss"] < 0.7 * result["first_loss"]
    assert result["state"] < most * result["adamw"]
    assert huggingface.read_config(tmp_path / "out").qk_norm == "gain"


def test_multi_device_learns_the_same_on_eight_devices_with_an_eighth_on_each():
    [path] = [path for path in FILES if path.stem == "multi_device"]
    env = os.environ | {"PYTHONPATH": str(path.parents[1])}
    done = subprocess.run(
        [sys.executable, path], env=env, capture_output=True, text=True, check=True
    )
    one, eight = (line.split() for line in done.stdout.splitlines())
    assert (one[0], eight[0]) == ("1", "8")
    first, last = (float(number.strip(",")) for number in (one[3], one[5]))
    assert last < 0.2 * first
    assert float(eight[5].strip(",")) == pytest.approx(last, rel=1e-2)
    held = [int(line[7].replace(",", "")) for line in (one, eight)]
    counts = 11 * 4
    assert held[1] == (held[0] - counts) / 8 + counts


def test_slurm_starts_a_run_and_goes_on_with_one(tmp_path):
    """With a `srun` that prints what it is to start."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    script, folder = FILES[0].with_name("slurm.sh"), tmp_path / "run"
    env = {"PATH": f"{srun.parent}:{os.environ['PATH']}", "RUN": str(folder)}

    def start():
        done = subprocess.run(
            ["bash", script], env=env, capture_output=True, text=True, check=True
        )
        program, *args = done.stdout.splitlines()
        assert program == "nanochat-jax"
        return args

    first = command_of(start())
    assert (first.checkpoint_dir, first.resume) == (str(folder), None)
    assert first.mesh == {"data": 4, "fsdp": 8} and first.coordinator is None
    asked = re.findall(
        r"^#SBATCH --(?:nodes|ntasks-per-node)=(\d+)$", read(script), re.M
    )
    assert math.prod(map(int, asked)) == math.prod(first.mesh.values())
    assert first.batch_size % math.prod(first.mesh.values()) == 0
    (folder / "500").mkdir(parents=True)
    assert start()[-2:] == ["--resume", str(folder)]


def read(path):
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_to_run_it(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 80
    assert f"`python examples/{path.name}`" in (
        ast.get_docstring(ast.parse(source)) or ""
    )
    assert f"test_{path.stem}_" in Path(__file__).read_text(encoding="utf-8")
