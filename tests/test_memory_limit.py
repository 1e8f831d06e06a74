"""A step fits its memory limit, or the cheapest settings that do are named."""

import dataclasses
import functools
import tomllib
import types

import jax
import pytest
from rich.console import Console

import tiny
from nanochat_jax import cli
from nanochat_jax.commands import command_of, train
from nanochat_jax.commands.reports import diagnosis
from nanochat_jax.config import Config
from nanochat_jax.config.byte_sizes import parse_bytes
from nanochat_jax.lm.planning import (
    limit_summary,
    memory_limit,
    mesh_plan,
    run_memory,
    step_parts,
)

CONFIG = tiny.run_config(n_layers=6, vocab_size=512, ns_steps=1)
SHORT = {"param_dtype": "bfloat16", "use_8bit_optim": True}
IN_BACKWARD = {"update_in_backward": True, "scan_layers": True}


HELD, count_held = {}, memory_limit._held_bytes


@pytest.fixture(autouse=True)
def counted_once(monkeypatch):
    """Weights and state, counted once for settings that many tests have."""

    def held_bytes(config):
        key = str(memory_limit.changes(limited(1), limited(1, config)))
        if key not in HELD:
            HELD[key] = count_held(config)
        return HELD[key]

    monkeypatch.setattr(memory_limit, "_held_bytes", held_bytes)


def limited(size, config=CONFIG):
    return dataclasses.replace(config, memory_limit=f"{size}B")


def held(config):
    return memory_limit._held_bytes(config)


def made_up_peak(config):
    """Weights and state, and temporaries that every cheap setting lessens."""
    rungs = memory_limit.relaxed(CONFIG)
    kinds = [memory_limit.changes(CONFIG, rung) for rung in rungs]
    rung = max(
        i
        for i, kind in enumerate(kinds)
        if all(getattr(config, key) == value for key, value in kind.items())
    )
    return held(config) + 40_000 - 10_000 * rung


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24e9), ("22.5 GB", 22.5e9), ("24GiB", 24 * 2**30), ("800mb", 8e8),
        ("1.5 TiB", 1.5 * 2**40), (" 64 kB ", 64e3), ("512B", 512),
    ],
)  # fmt: skip
def test_a_limit_is_a_number_with_a_unit(text, size):
    assert parse_bytes(text) == Config(memory_limit=text).memory_limit_bytes == size


@pytest.mark.parametrize("text", ["", "24", "24G", "GB", "-1GB", "0GB", "1iB", "1e9B"])
def test_another_limit_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"`memory_limit` must be .* \"24GB\", .* got"):
        Config(memory_limit=text)


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_limit_that_cannot_be_read_ends_a_command_with_2(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--memory-limit", "much"])
    assert stop.value.code == 2
    assert "`memory_limit` must be" in capsys.readouterr().err


def test_levels_have_ever_less_weights_and_state():
    found = list(memory_limit.levels(CONFIG))
    sizes = [size for _, size in found]
    assert len(found) > 4 and sizes == sorted(set(sizes), reverse=True)
    changed = [memory_limit.changes(CONFIG, other) for other, _ in found]
    assert changed[0] == {}
    assert changed[1] == {"use_8bit_optim": True}
    assert changed[2] == SHORT | {"weight_rounding": "split"}
    assert changed[3] == SHORT
    assert changed[4] == SHORT | {"quant_bits": 4}
    assert all(other.use_galore == (i > 4) for i, (other, _) in enumerate(found))


def test_levels_that_save_nothing_are_left_out():
    stored = dataclasses.replace(CONFIG, **SHORT)
    changed = [memory_limit.changes(stored, x) for x, _ in memory_limit.levels(stored)]
    assert changed[:2] == [{}, {"quant_bits": 4}]
    low_rank = dataclasses.replace(stored, use_galore=True, galore_residual=0.0)
    for other, _ in memory_limit.levels(low_rank):
        assert other.use_galore and other.galore_residual == 0


def test_what_costs_no_loss_keeps_tokens_weights_and_state():
    found = memory_limit.relaxed(CONFIG)
    assert found[0] == CONFIG and len(found) == 5
    assert {x.tokens_per_step for x in found} == {CONFIG.tokens_per_step}
    assert {held(x) for x in found} == {held(CONFIG)}
    assert (found[-1].batch_size, found[-1].remat_segment) == (1, 2)
    assert memory_limit.relaxed(found[-1]) == found[-1:]


def test_a_step_within_its_limit_has_nothing_to_change():
    def compile_nothing(config):
        raise AssertionError(config)

    found = memory_limit.search(limited(1000), 1000, compile_nothing)
    assert found.to_dict() == {
        "bytes": 1000,
        "fits": True,
        "tried": [{"settings": {}, "peak_bytes": 1000, "fits": True}],
    }
    said = functools.partial(limit_summary.limit_summary, limited(1000), found)
    assert "the step fits" in said(1000) and "initial state" not in said(1000)
    assert "initial state, at 0.0 MB, does not" in said(1001)


@pytest.mark.parametrize("level", range(6))
@pytest.mark.parametrize("rung", [0, 2, 4])
def test_the_cheapest_settings_that_fit_are_found(level, rung):
    known = [x for x, _ in memory_limit.levels(CONFIG)]
    wanted = memory_limit.relaxed(known[level])[rung]
    limit = made_up_peak(wanted)
    cheaper = [
        other
        for i, x in enumerate(known[: level + 1])
        for other in memory_limit.relaxed(x)[: rung if i == level else None]
    ]
    first = next((x for x in cheaper if made_up_peak(x) <= limit), wanted)
    found = memory_limit.search(limited(limit), made_up_peak(CONFIG), made_up_peak)
    assert found.fitting is found.trials[-1]
    assert found.fitting.settings == memory_limit.changes(CONFIG, first)
    assert found.fitting.peak_bytes == made_up_peak(first) <= limit


def test_steps_are_tried_in_the_order_of_their_cost():
    known = [
        memory_limit.changes(CONFIG, other)
        for x, _ in memory_limit.levels(CONFIG)
        for other in memory_limit.relaxed(x)
    ]
    for limit in range(150_000, made_up_peak(CONFIG), 40_000):
        found = memory_limit.search(limited(limit), made_up_peak(CONFIG), made_up_peak)
        places = [known.index(trial.settings) for trial in found.trials]
        assert places == sorted(set(places))
        assert not any(trial.fits for trial in found.trials[:-1])


def test_where_nothing_fits_the_least_is_told():
    found = memory_limit.search(limited(9), made_up_peak(CONFIG), made_up_peak)
    assert found.fitting is None and len(found.trials) == 3
    said = limit_summary.limit_summary(limited(9), found)
    over = run_memory.megabytes(found.least.peak_bytes - 9)
    assert f"it takes {over} too much" in said


def test_what_is_named_compiles_within_the_limit():
    compiled = []

    def peak_of(config):
        compiled.append((config, memory_limit.planned_peak(config)))
        return compiled[-1][1]

    tiny_run = tiny.run_config(n_layers=2, max_seq_len=64, ns_steps=1)
    peak = memory_limit.planned_peak(tiny_run)
    config = limited(peak - 1, tiny_run)
    found = memory_limit.search(config, peak, peak_of)
    assert found.fitting and not found.trials[0].fits
    applied = dataclasses.replace(config, **found.fitting.settings)
    assert compiled[-1] == (applied, found.fitting.peak_bytes)
    memory_limit.check(applied, compiled[-1][1])
    with pytest.raises(ValueError, match="the step is planned to take"):
        memory_limit.check(config, peak)


def test_the_lines_are_flags_and_toml_that_give_the_settings():
    settings = SHORT | IN_BACKWARD | {"remat": False, "galore_rest_bits": 2}
    read = tomllib.loads("\n".join(limit_summary.toml_lines(settings)))
    assert read == settings
    given = [word for flag in limit_summary.flags(settings) for word in flag.split()]
    command = command_of(["plan", *given])
    assert {key: getattr(command, key) for key in settings} == settings


def test_text_and_table_are_80_columns_wide():
    least = memory_limit.relaxed(list(memory_limit.levels(CONFIG))[-1][0])[-1]
    config = limited(made_up_peak(least))
    found = memory_limit.search(config, made_up_peak(CONFIG), made_up_peak)
    console = Console(width=80, record=True, quiet=True)
    console.print(limit_summary.limit_table(found))
    said = limit_summary.limit_summary(config, found)
    assert "clips the gradient of each layer" in said
    assert max(map(len, f"{console.export_text()}\n{said}".splitlines())) <= 80


def test_training_is_refused_before_its_state_is_made(tmp_path, monkeypatch, capsys):
    def allocate(run):
        raise AssertionError

    monkeypatch.setattr(train, "init_state", allocate)
    path, folder = tiny.write_config(tmp_path, memory_limit="9 kB"), tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--config-file", str(path), "--checkpoint-dir", str(folder)])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "`memory_limit` is 9 kB" in said and "nanochat-jax plan" in said
    assert not folder.exists()


def test_on_paper_a_step_is_beyond_its_limit_or_it_is_not_known():
    config = dataclasses.replace(CONFIG, mesh={"fsdp": 2})
    for size, fits in ((1000, False), (10**9, None)):
        plan = mesh_plan.plan_scale(limited(size, config))
        assert mesh_plan.limit(plan) == {"bytes": size, "fits": fits, "tried": []}
        assert f"`memory_limit` {size}B" in mesh_plan.summary(plan)


def test_parts_of_a_step_are_counted_from_shapes():
    def count(**settings):
        config = dataclasses.replace(CONFIG, **settings)
        run = run_memory.abstract_run(config)
        state = jax.eval_shape(run.tx.init, run.params)
        return step_parts.step_parts(config, run.params, state)

    plain, split = count(), count(param_dtype="bfloat16", weight_rounding="split")
    assert plain.gradient_bytes == 4 * plain.params
    assert (plain.low_bits_bytes, plain.kept_bytes, plain.accumulator_bytes) == (0,) * 3
    assert split.low_bits_bytes == plain.params
    table = 4 * 512 * 32
    layer = (plain.gradient_bytes - table - 4 * 32) // 6
    backward = count(**IN_BACKWARD, remat_segment=2)
    # The table is tied: its gradient is kept from the head on.
    assert backward.gradient_bytes == layer + table
    # Before three segments, and before the two layers of one.
    assert backward.kept_bytes == 5 * 4 * CONFIG.tokens_per_step * 32
    twice = count(**IN_BACKWARD, grad_accum_steps=2, weight_tied=False)
    assert twice.gradient_bytes == twice.accumulator_bytes == table + 4 * 32


def test_doctor_names_the_memory_of_each_device():
    def device(name, **stats):
        return types.SimpleNamespace(platform=name, id=0, memory_stats=lambda: stats)

    said = diagnosis._memory([device("gpu", bytes_limit=60 * 10**9), device("cpu")])
    assert said.splitlines()[0] == "gpu:0: 60.0 GB for JAX"
    assert said.splitlines()[1].startswith("machine: ")
    assert diagnosis._memory([device("cpu")]) == diagnosis.machine.memory()
