"""What a key of the settings is declared to be is what it does."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
import nanochat_jax as nj
from nanochat_jax.config import Config, Group, OptimizerConfig, schema
from nanochat_jax.lm.training import (
    compile_train_step,
    fit,
    make_run,
    reporter,
    step,
)
from nanochat_jax.lm.training.device_batches import feed_evaluation
from nanochat_jax.lm.training.reporter import Reporter

DECLARED = schema.declared(Config)

# Large enough for the ranks of all presets. Nothing is computed with these.
PARAMS = {
    "block": {
        "kernel": jax.ShapeDtypeStruct((600, 1200), jnp.float32),
        "bias": jax.ShapeDtypeStruct((1200,), jnp.float32),
    },
    "embed": {"embedding": jax.ShapeDtypeStruct((160, 64), jnp.float32)},
}
OPTIMIZER = OptimizerConfig(
    use_8bit_optim=True, use_galore=True, galore_rank=48, galore_rest_bits=2,
    galore_residual=0.25, weight_decay=0.1, warmup_steps=2, total_steps=10,
    ns_steps=2, ns_dtype="float32",
)  # fmt: skip
OPTIMIZER_KEYS = {
    "lr": 0.1, "fallback": "lion", "fallback_lr": 0.1, "weight_decay": 0.2,
    "warmup_steps": 3, "total_steps": 20, "schedule": "cosine",
    "decay_start_frac": 0.5, "min_lr_frac": 0.5, "grad_clip": 2.0,
    "muon_momentum": 0.5, "muon_scale": "rms", "ns_method": "polar_express_5",
    "ns_steps": 3, "ns_dtype": "bfloat16", "use_8bit_optim": False,
    "quantize_embeddings": False, "quant_bits": 4, "quant_block_size": 32,
    "quant_min_size": 20_000, "stochastic_rounding": True, "use_galore": False,
    "galore_rank": 0.25, "hardware": "a", "galore_update_freq": 7,
    "galore_residual": 0.5, "galore_rest_bits": 4, "galore_rest_momentum": 0.5,
    "projector_bits": 8, "weight_rounding": "split", "master_bits": 16,
    "adam_betas": (0.5, 0.95), "lion_betas": (0.5, 0.99), "seed": 1,
    "freeze": ("embed",), "groups": (Group("embed", lr=0.5),),
    "fallback_weight_decay": 0.3, "weight_decay_schedule": "cosine",
    "cautious_decay": True, "muon_momentum_warmup_steps": 3, "muon_momentum_start": 0.5,
    "vector_adam_b2": 0.5, "update_floor": 0.1, "row_floor": 0.1, "fixed_norm": True,
    "normalize_rows": "normuon", "normuon_beta": 0.5, "precondition": "both",
    "precondition_every": 3, "precondition_beta": 0.5, "precondition_bits": 16,
    "average_horizon": 4, "average_start_frac": 0.5,
}  # fmt: skip

RUN = Config(
    dim=32, n_layers=1, n_heads=4, vocab_size=40, max_seq_len=16, loss_chunk=8,
    dataset="tokens", token_dtype="uint32", batch_size=2, ns_steps=1, total_steps=6,
    eval_batches=2, log_interval=2, eval_interval=0, ternary=True, group_size=8,
    ns_dtype="float32",
)  # fmt: skip
RUN_KEYS = {
    "dim": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "ffn_mult": 3.0,
    "vocab_size": 48, "pad_vocab_to": 64, "max_seq_len": 32, "weight_tied": False,
    "head_dim": 16, "qk_norm": "gain", "norm_eps": 1e-5,
    "rope_scaling": (2.0, 1.0, 4.0, 8.0),
    "rope_theta": 500.0, "compute_dtype": "bfloat16", "param_dtype": "bfloat16",
    "remat": True, "scan_layers": True, "loss_chunk": 0, "ternary": False,
    "group_size": 16, "dataset": "synthetic", "token_dtype": "int32", "batch_size": 4,
    "grad_accum_steps": 2, "seq_len": 8, "mesh": {"data": 1},
    "update_in_backward": True, "remat_segment": 2, "log_interval": 1,
    "eval_interval": 2, "eval_batches": 3, "max_skipped_steps": 2, "spike_skip": 5.0,
    "qk_clip": 50.0, "qk_clip_interval": 3,
}  # fmt: skip
# Only the command asks for these: test_train_command.py holds the metric that the first
# adds, test_import.py the state with which a run starts, and test_averages.py the
# weights that are evaluated.
ELSEWHERE = {
    "measure_optimizer": True, "init_from": "models/a", "average_share": 0.5,
}  # fmt: skip
WITHOUT_EFFECT = {
    "checkpoint_interval": 100, "keep_last_checkpoints": 1,
    "keep_checkpoint_every": 1000, "sample_interval": 1, "sample_tokens": 5,
    "sample_prompt": "x", "data_path": "copy", "tokenizer": None,
    "token_format": "raw", "end_token": None, "text_field": "messages",
    "memory_limit": "24GB",
}  # fmt: skip

OF_COMPILED_STEP = (
    "spike_skip", "update_in_backward", "remat_segment", "qk_clip", "qk_clip_interval",
)  # fmt: skip

# Keys of bfloat16 weights, and others that they need.
OF_SHORT = {"weight_rounding": {}, "master_bits": {"weight_rounding": "split"}}
# Other keys that a key needs to have an effect, or without which it has one more.
NEEDED = {
    "dataset": {"data_path": (), "token_dtype": None},
    "hardware": {"galore_rank": None},
    "lion_betas": {"fallback": "lion"},
    "muon_momentum_start": {"muon_momentum_warmup_steps": 2},
    "normuon_beta": {"normalize_rows": "normuon"},
    "precondition_every": {"precondition": "short"},
    "precondition_beta": {"precondition": "short"},
    "precondition_bits": {"precondition": "short", "use_galore": False},
    "average_start_frac": {"average_horizon": 2},
    "update_in_backward": {"scan_layers": True},
    "qk_clip": {"qk_norm": "none"},
    "qk_clip_interval": {"qk_norm": "none", "qk_clip": 10.0},
    "remat_segment": {"n_layers": 2, "scan_layers": True, "update_in_backward": True},
}
CASES = [(key, NEEDED.get(key, {})) for key in OPTIMIZER_KEYS if key not in OF_SHORT]
CASES += [
    ("fallback_lr", {"fallback": "lion"}),
    ("galore_residual", {"galore_rest_bits": 0}),
    ("quant_block_size", {"use_galore": False, "fallback": "lion"}),
    ("quant_block_size", {"use_8bit_optim": False, "galore_rest_bits": 0}),
    ("seed", {"use_galore": False, "stochastic_rounding": True}),
    ("weight_decay", {"fallback": "lion"}),
]


def program_of_update(config, params=PARAMS):
    """Types of the state, and the operations of an update with all their numbers."""
    tx = nj.build_optimizer(config, params)
    state = jax.eval_shape(tx.init, params)
    return _text(tx.update, params, state, params)


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    """A token file, and a copy of it beside it."""
    folder = tmp_path_factory.mktemp("tokens")
    ids = np.random.default_rng(0).integers(0, 40, 2000).astype("<u4")
    for name in ("tokens.bin", "copy.bin"):
        ids.tofile(folder / name)
    return folder


def program_of_run(config):
    """Data of a run, where it runs, and the operations of its step."""
    run = make_run(config)
    config = run.config
    take = step.make_train_step(run.graphdef, run.tx)
    shape = (config.grad_accum_steps, config.batch_size, config.sequence + 1)
    batch = jax.ShapeDtypeStruct(shape, jnp.int32)
    program = _text(take, step.abstract_state(run), batch)
    return run.corpus.fingerprint, run.mesh, len(feed_evaluation(run)), program


def _text(function, *args):
    closed = jax.make_jaxpr(function)(*args)
    constants = [np.asarray(x).tobytes() for x in closed.consts]
    text = re.sub(r" at 0x\w+", "", str(closed))
    return text, constants, jax.tree.map(lambda x: (x.shape, str(x.dtype)), args)


def course(config, monkeypatch):
    """What the loop of a run reports, if all its steps are skipped, and how it ends."""
    monkeypatch.setattr(reporter, "Evaluator", lambda run: lambda params: {"val": 0})
    run = dataclasses.replace(make_run(config), config=config)
    guard = types.SimpleNamespace(skipped=0)
    state = types.SimpleNamespace(step=0, params=None, guard=guard)
    counts = iter(range(1, 99))

    def skip(state, batch):
        n = next(counts)
        return state, {
            "loss": 1.0,
            "grad_norm": 1.0,
            "skipped": n,
            "consecutive_skips": n,
        }

    lines, quiet = [], types.SimpleNamespace(update=print, log=print)
    sink = types.SimpleNamespace(
        write=lambda line: lines.append((line["step"], "loss" in line, "val" in line))
    )
    try:
        fit(run, state, skip, Reporter(run, 0, quiet, [sink]))
    except FloatingPointError as error:
        lines.append(str(error))
    return lines


def test_every_key_has_a_changed_value_here():
    tables = OPTIMIZER_KEYS | RUN_KEYS | ELSEWHERE | WITHOUT_EFFECT
    assert tables.keys() == {field.name for field in dataclasses.fields(Config)}
    assert tables.keys() == DECLARED.keys()
    assert WITHOUT_EFFECT.keys() == set(schema.affecting(Config, "nothing"))


@pytest.fixture(scope="module")
def usual():
    """Programs of updates by the keys that are needed."""
    known = {}

    def program(needed):
        name = repr(needed)
        if name not in known:
            known[name] = program_of_update(dataclasses.replace(OPTIMIZER, **needed))
        return known[name]

    return program


def test_a_program_is_told_the_same_twice(usual):
    assert program_of_update(OPTIMIZER) == usual({})


@pytest.mark.parametrize(("key", "needed"), CASES)
def test_every_key_of_the_optimizer_changes_its_state_or_update(key, needed, usual):
    changed = dataclasses.replace(OPTIMIZER, **needed, **{key: OPTIMIZER_KEYS[key]})
    assert getattr(changed, key) != getattr(OPTIMIZER, key)
    assert program_of_update(changed) != usual(needed)


@pytest.mark.parametrize("key", OF_SHORT)
def test_a_key_of_bfloat16_weights_changes_their_state_or_update_alone(key, usual):
    config = dataclasses.replace(OPTIMIZER, **OF_SHORT[key])
    changed = dataclasses.replace(config, **{key: OPTIMIZER_KEYS[key]})
    as_short = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    short = jax.tree.map(as_short, PARAMS)
    assert program_of_update(changed, short) != program_of_update(config, short)
    assert program_of_update(changed) == usual({})


@pytest.mark.parametrize("key", [key for key in OPTIMIZER_KEYS if DECLARED[key].needs])
def test_a_key_without_its_switch_changes_nothing(key, usual):
    off = {"galore_rest_bits": 0} | NEEDED.get(key, {})
    off |= {name: getattr(OptimizerConfig(), name) for name in DECLARED[key].needs}
    changed = dataclasses.replace(OPTIMIZER, **off | {key: OPTIMIZER_KEYS[key]})
    assert program_of_update(changed) == usual(off)


@pytest.fixture(scope="module")
def base(data_path):
    return dataclasses.replace(RUN, data_path=(str(data_path / "tokens.bin"),))


@pytest.fixture(scope="module")
def usual_run(base):
    return program_of_run(base)


@pytest.mark.parametrize("key", RUN_KEYS)
def test_every_key_of_a_run_changes_its_data_its_step_or_its_course(
    key, base, usual_run, monkeypatch
):
    changed = dataclasses.replace(base, **NEEDED.get(key, {}), **{key: RUN_KEYS[key]})
    assert getattr(changed, key) != getattr(base, key)
    if DECLARED[key].affects != "course" or key == "mesh":
        assert program_of_run(changed) != usual_run
    elif key in OF_COMPILED_STEP:
        monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: self.as_text())
        before = dataclasses.replace(base, **NEEDED.get(key, {}))
        steps = [compile_train_step(make_run(x)) for x in (changed, before)]
        assert steps[0] != steps[1]
    elif key == "eval_batches":
        assert len(feed_evaluation(make_run(changed))) == RUN_KEYS[key]
    else:
        assert course(changed, monkeypatch) != course(base, monkeypatch)


@pytest.mark.parametrize("key", ELSEWHERE | WITHOUT_EFFECT)
def test_a_key_that_affects_no_number_leaves_data_and_step_alone(
    key, base, usual_run, data_path
):
    value = (ELSEWHERE | WITHOUT_EFFECT)[key]
    value = (str(data_path / "copy.bin"),) if key == "data_path" else value
    assert program_of_run(dataclasses.replace(base, **{key: value})) == usual_run


SMALL = {
    "block": {"kernel": jnp.ones((8, 24)), "bias": jnp.ones(24)},
    "embed": {"embedding": jnp.ones((16, 8))},
    "lm_head": {"kernel": jnp.ones((8, 16))},
}


@pytest.mark.parametrize("fallback", ["adamw", "lion"])
def test_all_but_vectors_decay_at_their_rate(fallback):
    config = OptimizerConfig(
        lr=1.0, fallback_lr=0.5, weight_decay=0.1, fallback=fallback, ns_steps=1
    )
    tx = nj.build_optimizer(config, SMALL)
    zeros = jax.tree.map(jnp.zeros_like, SMALL)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(SMALL), SMALL)
    found = jax.tree.map(lambda x: {round(float(y), 6) for y in x.ravel()}, updates)
    assert found == {
        "block": {"kernel": {-0.1}, "bias": {0.0}},
        "embed": {"embedding": {-0.05}},
        "lm_head": {"kernel": {-0.05}},
    }


@pytest.mark.parametrize("quantised", [False, True])
def test_bases_are_of_singular_directions_exactly_where_moments_are_quantised(
    quantised,
):
    config = OptimizerConfig(
        use_galore=True, galore_rank=3, projector_bits=32, use_8bit_optim=quantised,
        quant_min_size=1, ns_steps=1,
    )  # fmt: skip
    params = {"kernel": jnp.zeros((8, 24))}
    g = helpers.matrix_with_spectrum((8, 24), [1.0, 0.95, 0.9, 0.01])
    tx = nj.build_optimizer(config, params)
    _, state = jax.jit(tx.update)({"kernel": g}, tx.init(params), params)
    [basis] = [x for x in jax.tree.leaves(state) if x.shape == (8, 3)]
    energies = np.asarray(basis.T @ g @ g.T @ basis)
    mixed = np.abs(energies - np.diag(np.diag(energies))).max() / energies.max()
    assert (mixed < 1e-3) == quantised
