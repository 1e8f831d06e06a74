"""What a run evaluates, exports and goes on from is the average that it says."""

import chex
import jax
import numpy as np
import optax
import pytest

from nanochat_jax.config import Config
from nanochat_jax.lm.checkpoints import Checkpoints, load_trained
from nanochat_jax.lm.training import (
    compile_train_step,
    init_state,
    make_run,
    read_out,
    resume,
)
from nanochat_jax.lm.training.device_batches import feed

SMALL = {
    "dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 64, "max_seq_len": 16,
    "batch_size": 2, "dataset": "synthetic", "total_steps": 6, "ns_steps": 1,
    "ns_dtype": "float32", "average_horizon": 3, "average_start_frac": 1 / 3,
    "eval_batches": 1,
}  # fmt: skip
KINDS = {
    "float32": {},
    "bfloat16, in backward": {"param_dtype": "bfloat16", "update_in_backward": True,
                              "scan_layers": True, "weight_rounding": "split"},
    "8 bits": {"use_8bit_optim": True, "quant_min_size": 1, "average_share": 1.0,
               "precondition": "short", "update_floor": 0.1, "fixed_norm": True},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_evaluations_and_exports_read_the_average_and_a_resumed_run_has_it(
    name, tmp_path
):
    run = make_run(Config(**SMALL | KINDS[name]))
    step, weights = compile_train_step(run), read_out(run)
    state, seen, saved = init_state(run), [], Checkpoints(tmp_path)
    with saved:
        for i, batch in feed(run, 0, 6):
            state, _ = step(state, batch)
            seen.append(jax.tree.map(lambda x: np.asarray(x, np.float32), state.params))
            if i == 3:
                saved.save(4, state, run.meta)
        whole = weights(state)
        half = resume.restore(run, saved, say=lambda line: None)
        exported = load_trained(tmp_path)
    near = {"rtol": 1e-2 if "bfloat16" in name else 1e-5, "atol": 1e-7}
    chex.assert_trees_all_close(exported.params, weights(half), **near)
    for _, batch in feed(run, 4, 6):
        half, _ = step(half, batch)
    chex.assert_trees_all_equal(weights(half), whole)
    mean = seen[2]
    for i, x in enumerate(seen[3:], 2):
        latest = 1 / min(i, 3)
        mean = jax.tree.map(lambda m, x, a=latest: m + a * (x - m), mean, x)
    share = run.config.average_share
    expected = jax.tree.map(lambda w, m: (1 - share) * w + share * m, seen[-1], mean)
    whole = jax.tree.map(lambda x: np.asarray(x, np.float32), whole)
    off = optax.tree.norm(optax.tree.sub(whole, expected))
    away = optax.tree.norm(optax.tree.sub(seen[-1], expected))
    assert off < {"float32": 1e-4, "8 bits": 0.1}.get(name, 0.5) * away
