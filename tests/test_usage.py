"""Memory, utilisation and the optimizer's share: numbers that are measured or known."""

import functools
import types

import jax
import numpy as np
import pytest

import tiny
from nanochat_jax.lm.runtime import utilization
from nanochat_jax.lm.training import optimizer_share
from nanochat_jax.lm.training.run import make_run
from nanochat_jax.lm.training.step import compile_train_step, init_state

TINY = tiny.run_config(grad_accum_steps=2, total_steps=4)


def device(kind, **stats):
    return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats or None)


# Memory


def test_on_the_cpu_memory_in_use_is_that_of_the_process():
    before = utilization.memory_in_use()
    held = np.ones(25_000_000)  # 200 MB
    assert before is not None
    assert 150e6 < utilization.memory_in_use() - before < 250e6
    del held
    assert utilization.memory_in_use() - before < 50e6


def test_on_devices_it_is_that_of_the_fullest(monkeypatch):
    devices = [device("x", bytes_in_use=3), device("x", bytes_in_use=5)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert utilization.memory_in_use() == 5


def test_where_nothing_tells_it_is_not_known(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(utilization.Path, "read_text", missing)
    assert utilization.memory_in_use() is None


# Utilisation


@pytest.mark.parametrize(
    ("kind", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float32", 494.7),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5", "float32", 459),
    ],
)
def test_published_peaks(kind, dtype, tera):
    assert utilization.peak_flops(device(kind), dtype) == tera * 1e12


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("cpu", "float32"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 D", "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "float64"),
    ],
)
def test_a_device_or_type_that_is_not_in_the_table_is_not_guessed(kind, dtype):
    assert utilization.peak_flops(device(kind), dtype) is None


def test_utilisation_is_the_share_of_all_devices():
    h200, other = device("NVIDIA H200"), device("NVIDIA H2000")
    assert utilization.mfu(1e6, 4.947e8, [h200]) == pytest.approx(0.5)
    assert utilization.mfu(1e6, 4.947e8, [h200] * 4) == pytest.approx(0.125)
    assert utilization.mfu(1e6, 4.947e8, [h200], "float32") == pytest.approx(1.0)
    assert utilization.mfu(1e6, 4.947e8, [h200, other]) is None
    assert utilization.mfu(1e6, 4.947e8, []) is None


# The optimizer's share


@pytest.fixture(scope="module")
def run():
    return make_run(TINY)


@pytest.fixture(scope="module")
def train_step(run):
    return compile_train_step(run)


@pytest.fixture
def batch():
    shape = (TINY.grad_accum_steps, TINY.batch_size, TINY.sequence + 1)
    return jax.random.randint(jax.random.key(0), shape, 0, TINY.vocab_size)


def test_the_pass_that_is_timed_is_that_of_the_step(run, train_step, batch):
    state = init_state(run)
    loss, norm = optimizer_share._loss_and_norm(run)(state.params, batch)
    _, metrics = train_step(state, batch)
    assert float(loss) == pytest.approx(float(metrics["loss"]), rel=1e-5)
    assert float(norm) == pytest.approx(float(metrics["grad_norm"]), rel=1e-4)


def test_the_share_is_what_the_pass_leaves_of_the_step(
    run, train_step, batch, monkeypatch
):
    # Seconds of the pass that compiles, then of the pass and of the step in turn.
    seconds, timed = iter([90.0, 3.0, 4.0, 6.0, 7.5, 1.0, 4.0]), optimizer_share.timed
    monkeypatch.setattr(
        optimizer_share, "timed", lambda *a: (next(seconds), timed(*a)[1])
    )
    share, state, medians = (
        optimizer_share.OptimizerShare(run),
        init_state(run),
        [],
    )
    assert share.median is None
    for _ in range(3):
        state, _ = share.take(train_step, state, batch)
        medians.append(share.median)
    assert medians == pytest.approx([0.25, 0.225, 0.25])
    assert share.seconds == 90 + 3 + 6 + 1


def test_steps_that_are_measured_are_those_that_are_not(run, train_step, batch):
    share, states = optimizer_share.OptimizerShare(run), []
    for take in (train_step, functools.partial(share.take, train_step)):
        state = init_state(run)
        for _ in range(optimizer_share.TURNS):
            state, _ = take(state, batch)
        states.append(jax.tree.map(np.asarray, state))
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert not share.wanted
