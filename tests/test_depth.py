"""`--depth`: what follows from it, and that all else comes before it."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from nanochat_jax import OptimizerConfig, cli
from nanochat_jax.commands import command_of
from nanochat_jax.config import Config
from nanochat_jax.config.depth import derive, describe

CONFIGS = Path(__file__).parents[1] / "configs"
DEPTHS = st.integers(1, 64)


@given(DEPTHS)
def test_every_depth_gives_a_model(depth):
    config = Config(**derive(depth))
    assert config.n_layers == depth and config.head_size == 64
    assert config.dim == 64 * config.n_layers
    sequences = config.batch_size * config.grad_accum_steps
    assert math.log2(sequences).is_integer() and config.batch_size <= 8


@given(DEPTHS)
def test_deeper_models_take_larger_batches_and_smaller_rates(depth):
    less, more = (Config(**derive(d)) for d in (depth, depth + 1))
    assert less.tokens_per_step <= more.tokens_per_step
    assert less.fallback_peak_lr >= more.fallback_peak_lr
    assert less.lr == more.lr


def test_twelve_layers_are_the_configuration_of_that_size():
    derived, config = derive(12), Config.from_toml(CONFIGS / "nano_125m.toml")
    derived["fallback_lr"] = None
    assert {key: getattr(config, key) for key in derived} == derived
    for fallback in ("adamw", "lion"):
        default = OptimizerConfig(fallback=fallback)
        assert derive(12, fallback)["fallback_lr"] == default.fallback_peak_lr


def test_flags_come_before_the_file_and_both_before_the_depth(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("depth = 3\nlr = 0.5\nbatch_size = 2\n")
    parse = lambda *args: command_of(["plan", "--config-file", str(file), *args])
    config = parse()
    assert (config.depth, config.dim, config.n_heads) == (3, 192, 3)
    assert (config.lr, config.batch_size) == (0.5, 2)
    config = parse("--depth", "4", "--lr", "0.25", "--fallback", "lion")
    assert (config.n_layers, config.dim, config.lr, config.batch_size) == (
        4, 256, 0.25, 2,
    )  # fmt: skip
    assert config.fallback_lr == derive(4, "lion")["fallback_lr"]
    assert command_of(["train", "--depth=2"]).n_heads == 2
    assert command_of(["train"]).dim == Config().dim


def test_a_part_of_the_settings_reads_its_part_of_the_depth(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("depth = 3\n")
    config = OptimizerConfig.from_toml(file)
    assert config.fallback_lr == derive(3)["fallback_lr"]
    assert Config.from_toml(file).n_layers == 3


def test_every_value_is_printed_and_what_was_set_otherwise():
    derived = derive(2)
    text = describe(2, Config(**{**derived, "lr": 0.5}))
    assert text.splitlines() == [
        "Depth 2: dim 128, n_layers 2, n_heads 2, batch_size 4, grad_accum_steps 1,",
        "    fallback_lr 0.0073",
        "  set otherwise: lr 0.5 (not 0.02)",
    ]
    assert "set otherwise" not in describe(2, Config(**derived))


def test_plan_prints_what_follows_from_the_depth(capsys):
    args = ["plan", "--depth", "1", "--vocab-size", "32"]
    assert cli.main(args) == 0
    assert "Depth 1: dim 64, n_layers 1, n_heads 1" in capsys.readouterr().out
    assert cli.main([*args, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["depth"] == derive(1)


@pytest.mark.parametrize("depth", ["0", "-1", "x", "1.5"])
def test_what_is_no_depth_is_refused(depth, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["train", f"--depth={depth}"])
    assert error.value.code == 2
    assert "depth` must be a whole number" in capsys.readouterr().err


def test_a_depth_that_is_no_number_is_refused_with_its_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("depth = true\n")
    with pytest.raises(ValueError, match=r"run\.toml: `depth` must be .* got True"):
        Config.from_toml(file)
