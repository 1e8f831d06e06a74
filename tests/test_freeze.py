"""Frozen parameters stay as they are to the bit, and cost no gradient and no state."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import keystr

import nanochat_jax as nj
from nanochat_jax import cli
from nanochat_jax.config import Config
from nanochat_jax.lm.checkpoints.store import Checkpoints
from nanochat_jax.lm.model import next_token_loss
from nanochat_jax.lm.planning import run_memory
from nanochat_jax.lm.training import compile_train_step, init_state
from nanochat_jax.lm.training.step import abstract_state
from nanochat_jax.optimizer import planned_bytes
from nanochat_jax.optimizer.baselines import build_adamw
from nanochat_jax.optimizer.roles import frozen_by
from tiny import run_config, write_config

SMALL = {"n_layers": 2, "weight_decay": 0.1, "ns_steps": 1, "weight_tied": False}
BATCH = np.random.default_rng(0).integers(0, 64, (1, 4, 17), dtype=np.int32)
SHORT = {
    "param_dtype": "bfloat16", "weight_rounding": "split", "use_8bit_optim": True,
    "use_galore": True, "scan_layers": True,
}  # fmt: skip
RUNS = {
    "apart": {"freeze": ("embed", "blocks/1", "*norm*")},
    "stacked, 8 bits, galore": {**SHORT, "freeze": ("*/attention", "head")},
    "in backward": {
        **SHORT, "update_in_backward": True, "freeze": ("*/attention", "embed")
    },
    "in backward, no block": {
        **SHORT, "update_in_backward": True, "freeze": ("blocks",)
    },
}  # fmt: skip

SLOW = pytest.mark.slow
CASES = [
    pytest.param(name, marks=() if name in ("apart", "in backward") else SLOW)
    for name in RUNS
]


@functools.cache
def trained(name):
    """A run with frozen parameters, its first state, and the one after two steps."""
    run = run_memory.abstract_run(run_config(**SMALL | RUNS[name]))
    step = compile_train_step(run)
    first = jax.tree.map(np.asarray, init_state(run))
    state, metrics = init_state(run), None
    for _ in range(2):
        state, metrics = step(state, jnp.asarray(BATCH))
    return run, step, first, state, metrics


@pytest.mark.parametrize("name", CASES)
def test_frozen_leaves_stay_to_the_bit_while_all_others_move(name):
    run, _, first, state, _ = trained(name)
    frozen = frozen_by(run.config.freeze, run.params)
    for path, x in jax.tree.leaves_with_path(first.params):
        same = (x == functools.reduce(lambda t, k: t[k.key], path, state.params)).all()
        assert same == (keystr(path) in frozen), keystr(path)


@pytest.mark.parametrize("name", CASES)
def test_frozen_leaves_have_no_state_and_are_told(name):
    run = trained(name)[0]
    frozen = frozen_by(run.config.freeze, run.params)
    names = [keystr(path) for path, _ in jax.tree.leaves_with_path(run.params)]
    leaves = nj.describe(run.tx, run.params).leaves
    for name, leaf in zip(names, leaves, strict=True):
        assert (leaf.label == "frozen") == (name in frozen)
        if name in frozen:
            assert (leaf.state_bytes, leaf.state) == (0, "")
            assert leaf.reason == f"`freeze` {frozen[name]!r}"
    report = nj.memory_report(run.tx, run.params)
    sizes = {keystr(p): x.size for p, x in jax.tree.leaves_with_path(run.params)}
    assert report.total_params == sum(
        size for key, size in sizes.items() if key not in frozen
    )


@pytest.mark.parametrize("name", CASES[:1] + CASES[2:])
def test_their_gradients_are_in_no_norm(name):
    """With `grad_clip` the other updates would depend on them."""
    run, step, _, _, _ = trained(name)
    frozen = frozen_by(run.config.freeze, run.params)
    state = init_state(run)
    loss = lambda params: next_token_loss(run.graphdef, params, BATCH[0])
    grads = jax.jit(jax.grad(loss))(state.params)
    kept = [x for p, x in jax.tree.leaves_with_path(grads) if keystr(p) not in frozen]
    _, metrics = step(state, jnp.asarray(BATCH))
    expected = optax.tree.norm([x.astype(jnp.float32) for x in kept])
    np.testing.assert_allclose(metrics["grad_norm"], expected, rtol=2e-2)
    assert expected < 0.98 * optax.tree.norm(
        jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    )


@pytest.mark.slow
def test_the_step_plans_less_memory():
    _, step, *_ = trained("stacked, 8 bits, galore")
    plain = run_memory.abstract_run(run_config(**SMALL | SHORT))
    whole = planned_bytes(compile_train_step(plain))
    part = planned_bytes(step)
    assert part["temp_bytes"] < whole["temp_bytes"]
    assert part["argument_bytes"] < whole["argument_bytes"]


PARAMS = {
    "embed": {"embedding": jnp.ones((8, 4))},
    "blocks": {1: {"up": {"kernel": jnp.ones((4, 4))}}, 10: {"up": jnp.ones((4, 4))}},
    "stack": {"kernel": jnp.ones((3, 4, 4)), "scale": jnp.ones((3, 4))},
}


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("embed", 1), ("blocks/1", 1), ("blocks/1*", 2), ("*/up", 2), ("*/kernel", 2),
        ("blocks/?", 1), ("stack/[ks]*", 2), ("blocks/1/up/kernel", 1),
    ],
)  # fmt: skip
def test_a_pattern_matches_a_parameter_or_a_module_around_it(pattern, count):
    assert len(frozen_by([pattern], PARAMS)) == count


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        (["emb"], "'emb' matches no parameter.* such as embed"),
        (["blocks/2"], "'blocks/2' matches no parameter"),
        (["stack/0"], r"'stack/0' is for layers .*stack/kernel \[3, 4, 4\]"),
        (["stack/*/kernel"], "stacked in one array, stack/kernel"),
        (["*"], "leaves no parameter to train"),
        (["emb", "stack/1"], "(?s)'emb' matches no.*'stack/1' is for layers"),
    ],
)
def test_a_pattern_that_cannot_be_met_is_refused(patterns, told):
    with pytest.raises(ValueError, match=told):
        frozen_by(patterns, PARAMS)


def test_baselines_that_train_everything_refuse_to_freeze():
    config = nj.OptimizerConfig(freeze=("embed",))
    with pytest.raises(ValueError, match="AdamW baselines train all parameters"):
        build_adamw(config, PARAMS)


def test_a_run_with_frozen_parameters_resumes_exactly(tmp_path, capsys):
    path = write_config(tmp_path, n_layers=2, total_steps=4, ns_steps=1)
    train = lambda *flags: cli.main(["train", "--config-file", str(path), *flags])
    freeze = ("--freeze", "embed", "--freeze", "blocks/0")
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    interval = ("--checkpoint-interval", "2")
    assert train("--checkpoint-dir", whole, *interval, *freeze) == 0
    out = capsys.readouterr().out
    assert re.search(r"Frozen: 12,\d+ of .*\(embed, blocks/0\)", out)
    resumed = ("--resume", f"{whole}/2", "--checkpoint-dir", parts)
    assert train(*resumed, *freeze) == 0
    read = lambda folder: Checkpoints(folder).restore(state_of(path), 4)
    chex.assert_trees_all_equal(read(whole), read(parts))
    with pytest.raises(SystemExit):
        train(*resumed)
    assert "config.freeze: stored ['embed', 'blocks/0']" in capsys.readouterr().err


def state_of(path):
    config = Config.from_toml(path, freeze=("embed", "blocks/0"))
    return abstract_state(run_memory.abstract_run(config))
