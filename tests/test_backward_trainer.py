"""The trainer's step with updates in the backward pass is its ordinary step."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.lm.checkpoints.store import Checkpoints
from nanochat_jax.lm.model import count_predictions, next_token_loss
from nanochat_jax.lm.training import resume
from nanochat_jax.lm.training.run import make_run, train_batches
from nanochat_jax.lm.training.step import (
    abstract_state,
    compile_train_step,
    init_state,
)
from tiny import run_config

STACKED = run_config(
    n_layers=2, scan_layers=True, grad_accum_steps=2, batch_size=2, grad_clip=0.0,
    lr=0.005, total_steps=8, galore_update_freq=2, ns_steps=2, quant_block_size=8,
)  # fmt: skip
VARIANTS = {
    "muon": {},
    "both, untied": {
        "use_8bit_optim": True, "use_galore": True, "weight_tied": False,
        "remat_segment": 2,
    },
}  # fmt: skip
SHORT = {"param_dtype": "bfloat16", "use_8bit_optim": True}


@functools.cache
def prepared(in_backward, **values):
    """Returns a run and its compiled step, of either kind."""
    if not in_backward:
        values.pop("remat_segment", None)
    config = dataclasses.replace(STACKED, update_in_backward=in_backward, **values)
    run = make_run(config)
    return run, compile_train_step(run)


def take_steps(in_backward, steps, state=None, **values):
    """Returns the state after some steps, and loss and norm of each."""
    run, step = prepared(in_backward, **values)
    state = init_state(run) if state is None else jax.tree.map(jnp.copy, state)
    batches, seen = train_batches(run.config, run.corpus), []
    for _ in range(steps):
        state, metrics = step(state, batches(int(state.step)))
        seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return state, np.array(seen)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_loss_is_the_mean_over_all_predictions_of_a_step(in_backward):
    """Also where the microbatches have unlike numbers of them."""
    run, step = prepared(in_backward, **VARIANTS["both, untied"])
    state = init_state(run)
    batch = jnp.asarray(train_batches(run.config, run.corpus)(0))
    batch = batch.at[0, :, 3:].set(~batch[0, :, 3:])
    losses = [
        next_token_loss(run.graphdef, state.params, part) * count_predictions(part)
        for part in batch
    ]
    expected = sum(losses) / count_predictions(batch)
    assert count_predictions(batch[0]) < count_predictions(batch[1]) / 4
    np.testing.assert_allclose(step(state, batch)[1]["loss"], expected, rtol=1e-5)
    # Fewer predictions than microbatches.
    ids = jnp.maximum(batch, ~batch)
    one = (~ids).at[0, 0, -1].set(ids[0, 0, -1])
    assert count_predictions(one) == 1
    expected = next_token_loss(run.graphdef, init_state(run).params, one[0])
    got = step(init_state(run), one)[1]["loss"]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["both, untied", pytest.param("muon", marks=pytest.mark.slow)]
)
def test_a_run_has_the_course_of_the_ordinary_one(name):
    usual, seen = take_steps(False, 4, **VARIANTS[name])
    state, same = take_steps(True, 4, **VARIANTS[name])
    np.testing.assert_allclose(same, seen, atol=1e-4)
    chex.assert_trees_all_close(state.params, usual.params, atol=1e-4)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, usual)
    counts = lambda guard: (int(guard.taken), int(guard.skipped))
    assert counts(state.guard) == counts(usual.guard) == (4, 0)


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_of_either_kind_of_step_resumes_in_the_other(first, tmp_path):
    values = VARIANTS["both, untied"]
    state, _ = take_steps(first, 2, **values)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state, prepared(first, **values)[0].meta)
    other, _ = prepared(not first, **values)
    restored = resume.restore(other, Checkpoints(tmp_path))
    chex.assert_trees_all_equal(restored, state)
    _, seen = take_steps(not first, 2, restored, **values)
    np.testing.assert_allclose(
        seen, take_steps(first, 2, state, **values)[1], atol=1e-4
    )


@pytest.mark.parametrize(
    ("rounding", "in_backward"),
    [
        ("stochastic", True),
        pytest.param("stochastic", False, marks=pytest.mark.slow),
        pytest.param("split", True, marks=pytest.mark.slow),
        pytest.param("split", False, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_weights_train_and_resume_with_the_same_bits(
    rounding, in_backward, tmp_path
):
    values = {**SHORT, "weight_rounding": rounding}
    run, _ = prepared(in_backward, **values)
    half, _ = take_steps(in_backward, 4, **values)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, half, run.meta)
    straight, seen = take_steps(in_backward, 4, half, **values)
    restored = resume.restore(run, Checkpoints(tmp_path))
    chex.assert_trees_all_equal(restored, half)
    resumed, same = take_steps(in_backward, 4, restored, **values)
    chex.assert_trees_all_equal(resumed, straight)
    np.testing.assert_array_equal(same, seen)
    chex.assert_trees_all_equal_shapes_and_dtypes(straight, abstract_state(run))
    types = {x.dtype.name for x in jax.tree.leaves(straight.params)}
    assert types == {"bfloat16"}
    first = take_steps(in_backward, 1, **values)[1]
    assert seen[-1, 0] < first[0, 0]


def test_a_loss_that_is_not_finite_is_skipped_and_counted():
    run, step = prepared(True, **VARIANTS["both, untied"])
    state = init_state(run)
    table = state.params["embed"]["embedding"].at[0, 0].set(jnp.inf)
    state = state._replace(params={**state.params, "embed": {"embedding": table}})
    before = jax.tree.map(np.array, state)
    after, metrics = step(
        state, jnp.zeros_like(train_batches(run.config, run.corpus)(0))
    )
    chex.assert_trees_all_equal(after.params, before.params)
    chex.assert_trees_all_equal(after.opt_state, before.opt_state)
    assert (int(metrics["skipped"]), int(metrics["consecutive_skips"])) == (1, 1)
    assert int(after.step) == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scan_layers": False}, "Set `scan_layers` to true"),
        ({"remat_segment": 3}, "must divide `n_layers`, 2, got 3"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(STACKED, update_in_backward=True, **values)
