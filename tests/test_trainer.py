"""The training step and the loop around it."""

import dataclasses
import io

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from nanochat_jax.lm.checkpoints.store import Checkpoints
from nanochat_jax.lm.model import next_token_loss
from nanochat_jax.lm.tracking.console import make_display
from nanochat_jax.lm.tracking.jsonl import MetricsWriter, read_metrics
from nanochat_jax.lm.training import loop, resume
from nanochat_jax.lm.training.accumulate import mean_gradient
from nanochat_jax.lm.training.evaluation import Evaluator
from nanochat_jax.lm.training.reporter import Reporter
from nanochat_jax.lm.training.run import make_run, train_batches
from nanochat_jax.lm.training.step import (
    abstract_state,
    compile_train_step,
    init_state,
    make_train_step,
)
from nanochat_jax.optimizer import schedule
from tiny import run_config

TINY = run_config(
    max_seq_len=32, total_steps=20, warmup_steps=2, eval_interval=10, eval_batches=2,
    log_interval=5, checkpoint_interval=10, galore_update_freq=4, muon_momentum=0.9,
    fallback_lr=0.01,
)  # fmt: skip
VARIANTS = {
    "muon": {},
    "muon_8bit": {"use_8bit_optim": True},
    "galore": {"use_galore": True},
    "galore_8bit": {"use_galore": True, "use_8bit_optim": True},
}


COMPILED = {}


def compiled(config):
    """Compiles the step of some settings once for all tests."""
    key = repr(config)
    if key not in COMPILED:
        COMPILED[key] = compile_train_step(make_run(config))
    return COMPILED[key]


def quiet(config, start=0, file=None):
    console = Console(file=file or io.StringIO())
    return make_display(config.total_steps, start_step=start, console=console)


def train(run, *, state=None, folder=None, step=None):
    state = init_state(run) if state is None else state
    first, step = int(state.step), step or compiled(run.config)
    with quiet(run.config, first) as display:
        if folder is None:
            return loop.fit(run, state, step, Reporter(run, first, display))
        with (
            Checkpoints(folder) as checkpoints,
            MetricsWriter(folder / "metrics.jsonl") as metrics,
        ):
            reporter = Reporter(run, first, display, [metrics])
            return loop.fit(run, state, step, reporter, checkpoints=checkpoints)


@pytest.fixture(scope="module")
def run():
    return make_run(TINY)


def test_one_step_gives_the_numbers_it_gave_before(run):
    """If this moved and you meant no change of model, data or optimizer, it is a bug.

    If you did, put the new numbers here and say in CHANGELOG.md what changed.
    """
    shape = (1, TINY.batch_size, TINY.sequence + 1)
    batch = (jnp.arange(np.prod(shape)).reshape(shape) * 7) % TINY.vocab_size
    state, metrics = compiled(TINY)(init_state(run), batch)
    moved = jax.tree.map(
        lambda a, b: jnp.abs(a - b).mean(), state.params, init_state(run).params
    )
    golden = {"loss": 4.1748, "grad_norm": 3.7178, "gate": 0.001220, "embedding": 0.005}
    found = {
        "loss": metrics["loss"],
        "grad_norm": metrics["grad_norm"],
        "gate": moved["blocks"][0]["ffn"]["gate"]["kernel"],
        "embedding": moved["embed"]["embedding"],
    }
    assert {k: float(v) for k, v in found.items()} == pytest.approx(golden, rel=2e-3)
    assert int(state.step) == 1


def test_microbatches_give_the_step_of_the_whole_batch(run):
    step = jax.jit(make_train_step(run.graphdef, run.tx))
    batch = jax.random.randint(jax.random.key(0), (1, 4, TINY.sequence + 1), 0, 64)
    whole, metrics = compiled(TINY)(init_state(run), batch)
    parts, same = step(init_state(run), batch.reshape(2, 2, -1))
    chex.assert_trees_all_close(same, metrics, rtol=1e-5)
    chex.assert_trees_all_close(parts.params, whole.params, atol=1e-4)


def test_the_state_keeps_its_types_and_its_memory(run):
    state = abstract_state(run)
    chex.assert_trees_all_equal_shapes_and_dtypes(init_state(run), state)
    planned = compiled(TINY).memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert planned.alias_size_in_bytes >= held  # donated, so updated in place


@pytest.mark.parametrize("name", VARIANTS)
def test_a_resumed_run_ends_with_the_same_bits(name, tmp_path):
    config = dataclasses.replace(TINY, **VARIANTS[name])
    run = make_run(config)
    straight = train(run, folder=tmp_path / "a")
    stored = Checkpoints(tmp_path / "a" / "10")
    resumed = train(run, state=resume.restore(run, stored), folder=tmp_path / "b")
    chex.assert_trees_all_equal(resumed, straight)
    assert run.config.variant == name
    dtypes = {x.dtype.name for x in jax.tree.leaves(straight.opt_state)}
    assert ("int8" in dtypes) == (name != "muon")


def test_metrics_have_a_line_an_interval_and_the_validation_loss_falls(run, tmp_path):
    train(run, folder=tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 5, 10, 15, 20]
    for line in lines[1:]:
        assert {"loss", "lr", "grad_norm", "tokens_per_s", "elapsed_s"} <= line.keys()
    evaluated = [line["val_loss"] for line in lines if "val_loss" in line]
    assert len(evaluated) == 3
    assert evaluated[-1] < evaluated[0] - 0.1
    # A chain of known entropy has no bytes, so no bits per byte are made up.
    assert not any("val_bpb" in line for line in lines)


def test_no_model_beats_the_entropy_of_the_chain(run):
    evaluate = Evaluator(run)
    state = train(run)
    loss = evaluate(state.params)["val_loss"]
    assert run.corpus.entropy_rate < loss < np.log(64) + 0.5


def spoilt(state):
    """Parameters of which one entry is infinite."""
    gate = state.params["blocks"][0]["ffn"]["gate"]
    gate["kernel"] = gate["kernel"].at[0, 0].set(jnp.inf)
    return state


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(name):
    config = dataclasses.replace(TINY, **VARIANTS[name])
    run, step = make_run(config), compiled(config)
    batch = train_batches(config, run.corpus)(0)
    state, _ = step(init_state(run), batch)
    state = spoilt(state)
    before = jax.tree.map(np.array, state)
    after, values = step(state, batch)
    chex.assert_trees_all_equal(after.params, before.params)
    chex.assert_trees_all_equal(after.opt_state, before.opt_state)
    assert not np.isfinite(values["loss"]) or not np.isfinite(values["grad_norm"])
    counts = (values["skipped"], values["consecutive_skips"])
    assert (int(after.step), *map(int, counts)) == (2, 1, 1)
    chex.assert_trees_all_equal(after.guard.mean, before.guard.mean)


def test_the_guard_takes_no_second_copy_of_parameters_or_gradients():
    """Beside the same step without it; under `lax.cond` it would take one."""
    config = dataclasses.replace(TINY, dim=128, n_layers=3, batch_size=1, seq_len=8)
    run = make_run(config)
    loss_fn = lambda params, batch: next_token_loss(run.graphdef, params, batch)

    def unguarded(state, batch):
        loss, grads = mean_gradient(loss_fn, state.params, batch)
        updates, opt_state = run.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(params=params, opt_state=opt_state), loss

    batch = jax.ShapeDtypeStruct((1, 1, 9), jnp.int32)
    step = jax.jit(unguarded, donate_argnums=0)
    plain = step.lower(abstract_state(run), batch).compile().memory_analysis()
    guarded = compile_train_step(run).memory_analysis()
    held = sum(4 * x.size for x in jax.tree.leaves(run.params))
    assert guarded.temp_size_in_bytes < plain.temp_size_in_bytes + 0.75 * held


def test_a_validation_that_predicts_nothing_is_refused(run):
    corpus = run.corpus
    read_only = dataclasses.replace(corpus, val=~np.asarray(corpus.val, np.int32))
    with pytest.raises(ValueError, match="no token of the held-out windows is pred"):
        Evaluator(dataclasses.replace(run, corpus=read_only))
    some = read_only.val.copy()
    some[: len(some) // 2] = ~some[: len(some) // 2]
    Evaluator(dataclasses.replace(run, corpus=dataclasses.replace(corpus, val=some)))


def test_a_loss_that_stays_not_finite_stops_the_run_and_says_so(run, tmp_path):
    config = dataclasses.replace(TINY, eval_interval=0)
    state = spoilt(init_state(run))._replace(step=jnp.int32(1))
    run, step = dataclasses.replace(run, config=config), compiled(TINY)
    with pytest.raises(FloatingPointError, match=r"step 11: the loss is nan and the "):
        train(run, state=state, folder=tmp_path, step=step)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(x["step"], x["loss"], x["skipped"]) for x in lines] == [
        (5, None, 4), (10, None, 9),
    ]  # fmt: skip


def test_a_validation_loss_that_is_not_finite_stops_the_run_unsaved(run, tmp_path):
    state = spoilt(init_state(run))._replace(step=jnp.int32(5))
    with pytest.raises(
        FloatingPointError, match=r"step 10: the validation loss is nan"
    ):
        train(run, state=state, folder=tmp_path)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["val_loss"] is None
    assert Checkpoints(tmp_path).steps() == []


def test_the_rate_that_is_logged_is_that_of_the_optimizer(run, tmp_path):
    """Which has not counted three steps that were skipped."""
    state = init_state(run)
    state = state._replace(guard=state.guard._replace(skipped=jnp.int32(3)))
    train(run, state=state, folder=tmp_path)
    rate = schedule(TINY, TINY.lr)
    for line in read_metrics(tmp_path / "metrics.jsonl")[1:]:
        assert line["lr"] == pytest.approx(float(rate(line["step"] - 1 - 3)))
        assert line["skipped"] == 3


def test_a_run_that_is_told_to_stop_saves_that_step_and_goes_on_as_if_it_had_not(
    run, tmp_path
):
    straight, asked, shown = train(run), [], io.StringIO()
    stop = lambda step: asked.append(step) or step == 7
    config = dataclasses.replace(TINY, sample_interval=3)
    sample = lambda params, step: f"text of step {step}"
    sampled = dataclasses.replace(run, config=config)
    reporter = Reporter(sampled, 0, quiet(TINY, file=shown), sample=sample)
    early = loop.fit(
        sampled, init_state(run), compiled(TINY), reporter, stop=stop,
        checkpoints=(checkpoints := Checkpoints(tmp_path)),
    )  # fmt: skip
    with checkpoints:
        assert asked == list(range(1, 8))
        assert int(early.step) == 7
    assert checkpoints.steps() == [7]
    assert [n for n in range(21) if f"text of step {n}\n" in shown.getvalue()] == [3, 6]
    resumed = train(run, state=resume.restore(run, Checkpoints(tmp_path)))
    chex.assert_trees_all_equal(resumed, straight)


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(run, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, init_state(run), run.meta)
    other = make_run(dataclasses.replace(TINY, lr=0.01, use_galore=True))
    with pytest.raises(
        ValueError, match=r"config.lr: stored 0.02, now 0.01(.|\n)*galo"
    ):
        resume.restore(other, Checkpoints(tmp_path))
    longer = make_run(dataclasses.replace(TINY, log_interval=7))
    assert int(resume.restore(longer, Checkpoints(tmp_path)).step) == 0


def test_epochs_set_the_number_of_steps():
    run = make_run(dataclasses.replace(TINY, batch_size=1024), epochs=2)
    windows = (len(run.corpus.train) - 1) // TINY.sequence
    assert run.config.total_steps == 2 * -(-windows // 1024)
