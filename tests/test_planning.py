"""What is planned for a training step is what it takes."""

import dataclasses

import jax
import numpy as np
import pytest

import nanochat_jax as nj
from nanochat_jax.config import Config
from nanochat_jax.lm.checkpoints.store import Checkpoints
from nanochat_jax.lm.planning import part_lines, parts_from_shapes, run_memory
from nanochat_jax.lm.planning.step_parts import step_parts
from nanochat_jax.lm.training.step import abstract_state, compile_train_step, init_state

CONFIG = Config(
    dim=32, n_layers=1, n_heads=2, vocab_size=2048, max_seq_len=16, batch_size=2,
    ns_dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def planned():
    run = run_memory.abstract_run(CONFIG)
    return run, run_memory.plan_run(run, compile_train_step(run))


def held(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_the_parts_are_the_arrays_of_the_step(planned):
    run, plan = planned
    state = init_state(run)
    assert plan.devices == 1
    assert plan.params_bytes == held(state.params)
    assert plan.opt_state_bytes == held(state.opt_state)
    assert plan.opt_state_bytes == nj.memory_report(run.tx, run.params).total_bytes
    assert plan.batch_bytes == 4 * 2 * 17
    assert plan.checkpoint_bytes == held(state)


def test_a_step_has_the_state_once_and_the_temporaries(planned):
    _, plan = planned
    parts = plan.checkpoint_bytes + plan.batch_bytes + plan.temp_bytes
    assert parts <= plan.step_bytes < parts + 1024  # metrics, and padding
    # The gradients are among them.
    assert plan.temp_bytes >= plan.params_bytes
    assert (plan.process_bytes or 0) > 1 << 20


def test_the_peak_is_that_of_the_steps_or_of_what_comes_before(planned):
    _, plan = planned
    # At the end of it parameters and the state of the optimizer are there.
    assert plan.init_bytes >= plan.params_bytes + plan.opt_state_bytes
    assert plan.peak_bytes == max(plan.step_bytes, plan.init_bytes)


def test_a_checkpoint_is_about_as_large_as_planned(planned, tmp_path):
    run, plan = planned
    rng = np.random.default_rng(0)
    noise = lambda x: rng.standard_normal(x.shape).astype(x.dtype)
    with Checkpoints(tmp_path) as checkpoints:
        state = jax.tree.map(noise, abstract_state(run))
        checkpoints.save(1, jax.tree.map(jax.numpy.asarray, state), {})
    files = [path for path in (tmp_path / "1").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    bookkeeping = 1 << 17
    assert 0.8 * plan.checkpoint_bytes < size < plan.checkpoint_bytes + bookkeeping


def test_the_step_alone_is_told_too(planned):
    _, plan = planned
    assert run_memory.step_bytes(plan) == {
        "weights_bytes": plan.params_bytes,
        "state_bytes": plan.opt_state_bytes,
        "temp_bytes": plan.temp_bytes,
        "peak_bytes": plan.step_bytes,
    }


def test_gradients_are_added_up_in_float32_in_full_or_of_a_layer_at_a_time():
    known = lambda **kwargs: dataclasses.replace(CONFIG, n_layers=3, **kwargs)
    count = lambda config: run_memory.accumulator_bytes(
        config, run_memory.abstract_run(config).params
    )
    assert count(known()) == 0
    twice = known(grad_accum_steps=2, scan_layers=True)
    params = run_memory.abstract_run(twice).params
    held = {
        key: 4 * sum(x.size for x in jax.tree.leaves(params[key])) for key in params
    }
    assert count(twice) == sum(held.values())
    short = dataclasses.replace(twice, param_dtype="bfloat16")
    assert count(short) == sum(held.values())
    layer = held["blocks"] // 3
    rest = sum(held.values()) - held["blocks"]
    in_backward = dataclasses.replace(twice, update_in_backward=True)
    assert count(in_backward) == max(layer, rest)


def test_low_bits_of_weights_are_counted_with_and_without_a_state():
    split = {"param_dtype": "bfloat16", "weight_rounding": "split"}
    run = run_memory.abstract_run(dataclasses.replace(CONFIG, **split))
    held = nj.memory_report(run.tx, run.params)
    state = jax.eval_shape(run.tx.init, run.params)
    parts = parts_from_shapes(run.config, run.params, held)
    assert parts == step_parts(run.config, run.params, state)
    assert parts.low_bits_bytes == parts.params  # a byte each
    said = part_lines(run.config, parts, 2 * parts.params, held.total_bytes)
    assert "    low bits of the weights 0.1 MB" in said


def test_the_lines_give_peak_parts_and_checkpoints(planned):
    _, plan = planned
    plan = plan._replace(peak_bytes=7_000_000, process_bytes=2_000_000)
    said = run_memory.plan_summary(CONFIG, plan)
    assert "Peak memory: 7.0 MB\n" in said
    assert "a compiled step of 32 tokens" in said
    assert "resident memory about 9.0 MB, with 2.0 MB of Python" in said
    assert "at most 4 of them on disk:" in said
    on_gpus = plan._replace(devices=8, process_bytes=None)
    said = run_memory.plan_summary(CONFIG, on_gpus)
    assert "Peak memory: 7.0 MB on each of 8 devices\n" in said
    assert "resident" not in said
