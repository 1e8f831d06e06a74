"""The reporter's numbers of speed, by a clock that tests set."""

import types

import jax.numpy as jnp
import pytest

import tiny
from nanochat_jax.lm.training import init_state, make_run
from nanochat_jax.lm.training.reporter import Reporter

VALUES = {"loss": 2.0, "grad_norm": 1.0, "skipped": 0}


class Display:
    """Keeps the lines of metrics and the texts it is given."""

    def __init__(self):
        self.lines, self.texts = [], []

    def update(self, done):
        pass

    def log(self, values):
        self.lines.append(values)

    def print(self, text):
        self.texts.append(text)


@pytest.fixture(scope="module")
def run():
    return make_run(
        tiny.run_config(
            total_steps=8, log_interval=2, eval_interval=4, sample_interval=3,
            grad_accum_steps=2,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def params(run):
    return init_state(run).params


def report(run, params, *, seconds=(0.0, 0.0), sample=None):
    """Reports the steps of a run; `seconds` are those of a step and of each report."""
    now, display = [100.0], Display()
    of_a_step, of_a_report = seconds

    def write(values):
        now[0] += of_a_report

    sink = types.SimpleNamespace(write=write)
    reporter = Reporter(run, 0, display, [sink], sample, clock=lambda: now[0])
    reporter.start(params)
    for done in range(1, run.config.total_steps + 1):
        now[0] += of_a_step
        reporter.step(done, params, VALUES)
    return display


def test_the_speed_is_tokens_by_seconds_of_training_without_those_of_reports(
    run, params
):
    lines = report(run, params, seconds=(0.5, 30.0)).lines
    tokens = 2 * 4 * 16  # microbatches, sequences, tokens of each
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
    assert [line["tokens"] for line in lines] == [i * tokens for i in (0, 2, 4, 6, 8)]
    assert [x["tokens_per_s"] for x in lines[1:]] == pytest.approx([tokens / 0.5] * 4)
    # All of the run, its reports among it.
    assert [line["elapsed_s"] for line in lines[1:]] == [31.0, 62.0, 93.0, 124.0]


def test_time_spent_on_measuring_the_optimizer_is_not_training(run, params):
    share = types.SimpleNamespace(seconds=0.0, median=0.25)

    class Measured(Display):
        def update(self, done):
            share.seconds += 3.0

    now, display = [0.0], Measured()
    reporter = Reporter(run, 0, display, share=share, clock=lambda: now[0])
    for done in (1, 2):
        now[0] += 3.5
        reporter.step(done, params, VALUES)
    assert display.lines[-1]["tokens_per_s"] == pytest.approx(2 * 4 * 16 / 0.5)
    assert display.lines[-1]["optimizer_share"] == 0.25


def test_evaluations_and_samples_come_at_their_own_intervals(run, params):
    display = report(
        run, params, seconds=(1.0, 0.0), sample=lambda params, step: f"text {step}"
    )
    evaluated = [line["step"] for line in display.lines if "val_loss" in line]
    assert evaluated == [0, 4, 8]
    assert display.texts == [f"\nA sample after step {n}:\ntext {n}\n" for n in (3, 6)]


def test_a_validation_loss_that_is_not_finite_is_written_and_then_raised(run, params):
    display = Display()
    reporter = Reporter(run, 0, display, clock=lambda: 0.0)
    spoilt = {**params, "final_norm": {"scale": jnp.full(32, jnp.nan)}}
    with pytest.raises(FloatingPointError, match=r"step 0: the validation loss is nan"):
        reporter.start(spoilt)
    assert jnp.isnan(display.lines[0]["val_loss"])
