"""Variants side by side: the same runs as `train`, counted, averaged and resumed."""

import dataclasses
import itertools
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import nanochat_jax as nj
from nanochat_jax import cli
from nanochat_jax.commands import compare as command
from nanochat_jax.config import Config
from nanochat_jax.experiments import speed
from nanochat_jax.lm.planning.variants import NAMES, parse_variants
from nanochat_jax.lm.tracking.jsonl import read_metrics
from nanochat_jax.lm.training import optimizer_share, run as setup, step as trainer
from nanochat_jax.optimizer.baselines import build_adamw

pytest.importorskip("matplotlib")

TINY = """
dim = 32
n_layers = 1
n_heads = 2
ffn_mult = 2.0
vocab_size = 64
max_seq_len = 16
dataset = "synthetic"
batch_size = 4
eval_batches = 2
eval_interval = 2
log_interval = 1
galore_rank = 8
galore_update_freq = 3
quant_min_size = 0
ns_steps = 1
"""
LOW_RANK = "galore_8bit:galore_rank=4"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(TINY)
    return path


def compare(config, output, *args):
    args = ["compare", "--config-file", config, "--steps", 4, "--output", output, *args]
    return cli.main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def output(config, tmp_path_factory):
    """The folder of a comparison of two variants with two seeds."""
    folder = tmp_path_factory.mktemp("compare")
    two = ["--variants", "muon", LOW_RANK, "--seeds", 2]
    assert compare(config, folder, *two, "--speed-steps", 1) == 0
    return folder


def read(folder):
    return json.loads((folder / "report.json").read_text())


def refused(capsys, *args):
    with pytest.raises(SystemExit) as error:
        compare(*args)
    assert error.value.code == 2
    return capsys.readouterr().err


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}


def test_the_report_is_the_mean_over_seeds_of_what_the_runs_gave(output):
    report = read(output)
    assert (report["steps"], report["seeds"]) == (4, 2)
    assert report["versions"]["jax"] == jax.__version__
    assert list(report["variants"]) == ["muon", LOW_RANK]
    muon, low = report["variants"].values()
    for values in (muon, low):
        assert values["seeds"] == [0, 1]
        assert values["val_loss"] == pytest.approx(np.mean(values["val_losses"]))
        spread = np.std(values["val_losses"], ddof=1)
        assert values["val_loss_std"] == pytest.approx(spread)
        assert values["val_bpb"] is None  # a chain of symbols has no bytes
        last = [losses[-1]["val_loss"] for losses in values["losses"]]
        assert last == values["val_losses"]
        assert [line["step"] for line in values["losses"][0]] == [0, 1, 2, 3, 4]
        assert values["tokens_per_s"] > 0
        assert values["temp_bytes"] > 0
    ratios = np.divide(low["val_losses"], muon["val_losses"])
    assert low["loss_ratio"] == pytest.approx(ratios.mean())
    assert low["loss_ratio_std"] == pytest.approx(ratios.std(ddof=1))
    assert (muon["loss_ratio"], muon["tokens_per_s_ratio"]) == (1, 1)


def test_a_variant_is_trained_as_train_trains_it(config, output, tmp_path):
    flags = [
        "--use-8bit-optim", "--use-galore", "--galore-rank", "4", "--total-steps", "4",
    ]  # fmt: skip
    train = ["train", "--config-file", str(config), "--checkpoint-dir", str(tmp_path)]
    assert cli.main([*train, *flags]) == 0
    lines = read_metrics(tmp_path / "metrics.jsonl")
    losses = read(output)["variants"][LOW_RANK]["losses"][0]
    keys = ("step", "loss", "val_loss")
    assert losses == [{k: line[k] for k in keys if k in line} for line in lines]


def test_bytes_are_those_of_the_arrays_held(config, output):
    variants = read(output)["variants"]
    for variant in parse_variants([*variants], Config.from_toml(config), 0.01):
        run = setup.make_run(variant.config)
        state = trainer.init_state(run).opt_state
        values = variants[variant.name]
        assert values["total_state_bytes"] == sum(
            x.nbytes for x in jax.tree.leaves(state)
        )
        report = nj.memory_report(run.tx, run.params)
        assert values["matrix_state_bytes"] == report.matrix_bytes
    muon, low = variants.values()
    assert 0 < low["matrix_state_bytes"] < 0.25 * muon["matrix_state_bytes"]


def test_the_seed_changes_the_start_for_all_variants_alike(output):
    muon, low = read(output)["variants"].values()
    first = lambda values: [losses[0]["val_loss"] for losses in values["losses"]]
    assert first(muon) == first(low)
    assert first(muon)[0] != first(muon)[1]


def test_figures_and_runs_are_written(output):
    for name in ("loss_by_step.png", "loss_by_bytes.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    names = ("muon", "galore_8bit_galore_rank=4")
    assert times(output).keys() == {
        f"{name}-seed{seed}.{kind}"
        for name, seed, kind in itertools.product(names, (0, 1), ("json", "jsonl"))
    }


def test_a_stopped_comparison_goes_on_and_ends_as_it_would_have(config, output, capsys):
    before, report = times(output), read(output)
    lost = "muon-seed1.json"
    (output / "runs" / lost).unlink()
    two = ["--variants", "muon", LOW_RANK, "--seeds", 2, "--speed-steps", 0]
    assert compare(config, output, *two) == 0
    after = times(output)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {lost, lost + "l"}
    out = capsys.readouterr().out
    assert "4 runs, 3 of them done already" in out
    assert out.count("step 4/4") == out.count("Compiling the training step\n") == 1
    assert f"Report:  {output}/report.json\nFigures: {output}/loss_by_step" in out
    assert "\x1b" not in out
    again = read(output)["variants"]
    for name, values in report["variants"].items():
        assert again[name]["losses"] == values["losses"]
        assert again[name]["loss_ratio"] == values["loss_ratio"]
        assert again[name]["tokens_per_s"] is None  # not timed, so not made up


@pytest.mark.parametrize("columns", [80, 140])
def test_a_comparison_that_is_done_fits_the_terminal(
    columns, config, output, capsys, monkeypatch
):
    kind = {"force_terminal": True, "width": columns, "_environ": {}}
    monkeypatch.setattr(command, "Console", lambda: Console(**kind))
    two = ["--variants", "muon", LOW_RANK, "--seeds", 2, "--speed-steps", 0]
    assert compare(config, output, *two) == 0
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out).splitlines()
    assert "4 runs, 4 of them done already" in lines
    assert any(line.startswith(" muon") for line in lines)
    assert [x for x in lines if len(x) > columns and str(output) not in x] == []


def test_results_of_other_settings_are_refused_and_left_alone(config, output, capsys):
    before = times(output)
    two = ["--variants", "muon", LOW_RANK, "--seeds", 2]
    message = refused(capsys, config, output, *two, "--lr", 0.5)
    assert "muon-seed0.json: `lr` was 0.02, is 0.5" in message
    assert "rank=4-seed1.json: `lr` was 0.02, is 0.5" in message
    assert times(output) == before
    # What does not move the numbers may change.
    same = [*two, "--keep-last-checkpoints", 9, "--speed-steps", 0]
    assert compare(config, output, *same) == 0


def test_adamw_and_a_variant_that_diverges(config, tmp_path, capsys):
    lost = "adamw:lr=1e38"
    variants = ["--variants", lost, "adamw", "adamw_galore"]
    flags = [*variants, "--adamw-lr", 0.01, "--speed-steps", 0, "--quant-bits", 4]
    assert compare(config, tmp_path, *flags, "--max-skipped-steps", 2) == 0
    out = capsys.readouterr().out
    assert "diverged" in out
    assert "No ratios, since `muon` is not" in " ".join(out.split())
    report = read(tmp_path)["variants"]
    assert report[lost]["val_loss"] is None
    assert "step 3: the gradient norm is" in report[lost]["errors"][0]
    assert report["adamw"]["val_loss"] < report["adamw"]["losses"][0][0]["val_loss"]
    assert report["adamw"]["loss_ratio"] is None
    assert report["adamw"]["val_loss_std"] is None  # of one seed
    galore = report["adamw_galore"]
    assert galore["matrix_state_bytes"] < 0.6 * report["adamw"]["matrix_state_bytes"]
    result = json.loads((tmp_path / "runs" / "adamw-seed0.json").read_text())
    assert result["settings"]["lr"] == 0.01


@pytest.mark.parametrize("name", [name for name in NAMES if "adamw" not in name])
@pytest.mark.parametrize("flags", [{}, {"use_8bit_optim": True, "quant_bits": 4}])
def test_a_name_says_what_is_built_whatever_the_file_says(name, flags):
    config = Config(use_galore=True, galore_residual=0.5, **flags)
    (variant,) = parse_variants([name], config, 0.01)
    assert variant.config.variant == name


def test_settings_after_a_name_are_read_as_toml():
    (variant,) = parse_variants(
        ["muon:lion_betas=[0.8, 0.9],weight_decay=0.1,fallback=lion"], Config(), 0.01
    )
    config = variant.config
    assert (config.lion_betas, config.weight_decay) == ((0.8, 0.9), 0.1)
    assert (config.fallback, config.lr) == ("lion", Config().lr)


def test_names_that_do_not_do_are_all_refused_at_once(config, tmp_path, capsys):
    names = [
        "muon", "muon", "sgd", "galore:galore_residual=0", "muon:dim=64", "muon:lr",
        "muon_8bit:quant_blok_size=3", "muon_4bit:lr=-1", "galore:galore_rank=low",
        "adamw:ns_steps=3", "muon:galore_rank=3", "galore:quant_bits=4",
        "adamw:galore_rank=3",
    ]  # fmt: skip
    message = refused(capsys, config, tmp_path / "new", "--variants", *names)
    for part in (
        "must name each variant once",
        "got 'sgd'",
        "`galore:galore_residual=0`: its settings are those of `galore_plain`",
        "`muon:dim=64`: ['dim'] may not follow its name",
        "`adamw:ns_steps=3`: ['ns_steps'] may not follow its name",
        "`muon:galore_rank=3`: ['galore_rank'] have no effect",
        "`galore:quant_bits=4`: ['quant_bits'] have no effect",
        "`adamw:galore_rank=3`: ['galore_rank'] have no effect",
        "`muon:lr`: settings must be `key=value`",
        "Did you mean `quant_block_size`?",
        "`lr` must be at least 0, got -1.0",
        "`galore_rank` must be of type int, got 'low'",
    ):
        assert part in message
    assert not (tmp_path / "new").exists()


def test_flags_that_do_not_do_are_refused_before_anything_is_written(
    config, tmp_path, capsys, monkeypatch
):
    new = tmp_path / "new"
    message = refused(capsys, config, new, "--seeds", 0, "--speed-steps", -1)
    assert "`seeds` must be at least 1" in message
    assert "`speed_steps` must be at least 0" in message
    with pytest.raises(SystemExit):
        cli.main(["compare", "--config-file", str(config)])
    assert "`--output` is required" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "nanochat-jax[plot]" in refused(capsys, config, new)
    assert not new.exists()


def test_ctrl_c_says_how_to_go_on_and_where_the_report_is(
    config, output, tmp_path, capsys, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_trial", interrupt)
    again = "interrupted. The same command goes on with the runs that are not done.\n"
    assert compare(config, tmp_path) == 130
    assert capsys.readouterr().err.endswith(again)
    assert compare(config, output, "--variants", "galore") == 130
    told = f"{again}Report of those that are: {output}/report.json\n"
    assert capsys.readouterr().err.endswith(told)


def test_a_folder_with_other_files_is_refused_and_left_alone(config, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    for name in ("report.json", "runs/muon-seed0.json", ".hidden", "x.tmp"):
        (tmp_path / name).touch()
    for name in ("thesis.tex", "runs/notes.txt"):
        (tmp_path / name).touch()
    message = refused(capsys, config, tmp_path)
    assert f"{tmp_path}/runs/notes.txt, {tmp_path}/thesis.tex. Choose" in message
    assert len(list(tmp_path.rglob("*"))) == 7


PARAMS = {
    "embed": {"embedding": jnp.ones((16, 8))},
    "block": {"kernel": jnp.ones((8, 24)), "bias": jnp.ones(24)},
}


def test_adamw_is_that_of_optax_but_leaves_vectors_undecayed():
    config = nj.OptimizerConfig(lr=0.1, weight_decay=0.2, grad_clip=0.0)
    grads = jax.tree.map(lambda x: x * 0.3, PARAMS)
    decayed = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    oracle = optax.adamw(0.1, *config.adam_betas, weight_decay=0.2, mask=decayed)
    tx = build_adamw(config, PARAMS)
    expected, _ = oracle.update(grads, oracle.init(PARAMS), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_adamw_with_galore_keeps_moments_of_matrices_only_in_low_rank():
    config = nj.OptimizerConfig(use_galore=True, galore_rank=2)
    report = nj.memory_report(build_adamw(config, PARAMS), PARAMS)
    matrix = {row.field: row.entries for row in report.rows if row.label == "matrix"}
    assert matrix == {"mu": 8 * 2, "nu": 8 * 2, "projector": 24 * 2}
    embedding = [row.entries for row in report.rows if row.label == "embedding"]
    assert embedding == [16 * 8, 16 * 8]


def test_a_ratio_of_speeds_is_taken_within_each_turn():
    # The machine slowed down by ten in the middle; the ratio stays.
    slow, fast = speed.Speed(1.0, [2.0, 20.0, 4.0]), speed.Speed(2.0, [1.0, 10.0, 1.0])
    assert fast.ratio(slow) == 2.0
    assert slow.ratio(fast) == 0.5


@pytest.mark.parametrize(("use_galore", "expected"), [(True, 1 + 10 / 5), (False, 1)])
def test_a_refresh_is_spread_over_the_steps_to_the_next(
    use_galore, expected, config, monkeypatch
):
    base = Config.from_toml(config)
    run = setup.make_run(
        dataclasses.replace(base, use_galore=use_galore, galore_update_freq=5)
    )
    seconds = [0, 11] + [0, 1] * speed.BURST  # start and end of each step
    clock = itertools.accumulate(seconds)
    monkeypatch.setattr(optimizer_share.time, "perf_counter", lambda: next(clock))
    run_nothing = lambda state, batch: (state, {})
    found = speed._seconds_a_step(run, run_nothing, {"x": jnp.zeros(1)})
    assert found == pytest.approx(expected)
