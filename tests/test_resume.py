"""A resumed run is the same run, or says what differs; its storage may change."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nanochat_jax as nj
from nanochat_jax.commands.train import Train
from nanochat_jax.config import Config
from nanochat_jax.lm.checkpoints.store import Checkpoints
from nanochat_jax.lm.data.token_file import write_tokens
from nanochat_jax.lm.training import resume
from nanochat_jax.lm.training.run import make_run
from nanochat_jax.lm.training.step import TrainState, abstract_state
from nanochat_jax.optimizer import schedule
from tiny import run_config

BITS8 = {"use_8bit_optim": True}
GALORE = {"use_galore": True}


def prepare(**kwargs):
    return make_run(run_config(**kwargs))


def some_state(run):
    """A state with numbers in it, as if after one step."""
    like = abstract_state(run)
    keys = map(jax.random.key, itertools.count())
    fill = lambda x: (
        jnp.ones(x.shape, x.dtype)
        if jnp.issubdtype(x.dtype, jnp.integer)
        else jax.random.uniform(next(keys), x.shape).astype(x.dtype)
    )
    shapes = jax.eval_shape(nj.dequantize, like.opt_state)
    store = jax.jit(lambda state: nj.quantize(like.opt_state, state, 1))
    opt_state = store(jax.tree.map(fill, shapes))
    return TrainState(
        fill(like.step),
        jax.tree.map(fill, run.params),
        opt_state,
        jax.tree.map(fill, like.guard),
    )


def plain(run, state):
    return jax.jit(nj.dequantize)(state.opt_state)


@pytest.fixture
def saved(tmp_path):
    """Returns a function that saves a state of a run, and where."""

    def save(run):
        state = some_state(run)
        with Checkpoints(tmp_path / "run") as checkpoints:
            checkpoints.save(1, state, run.meta)
        return state, Checkpoints(tmp_path / "run")

    return save


def restore(run, checkpoints):
    """Restores with another storage; returns the state and what was said."""
    said = []
    state = resume.restore(run, checkpoints, allow=["codec"], say=said.append)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, abstract_state(run))
    return state, said


def relative_errors(run, state, reference):
    measure = jax.jit(lambda state: nj.quantization_error(state, reference))
    return [float(error.relative) for error in measure(state.opt_state).values()]


def test_float32_goes_to_8_bits_within_the_error_of_the_codec(saved):
    state, checkpoints = saved(prepare())
    run = prepare(**BITS8)
    restored, said = restore(run, checkpoints)
    errors = relative_errors(run, restored, plain(prepare(), state))
    assert len(errors) == 7 + 2 + 6  # momenta, both moments of embedding and vectors
    assert 0 < max(errors) < 0.02
    [line] = said
    assert str(checkpoints.directory) in line
    assert "use_8bit_optim False -> True" in line
    assert int(restored.step) == 1
    chex.assert_trees_all_equal(restored.params, state.params)


def test_from_8_bits_to_float32_and_back_the_codes_of_momentum_are_the_same(saved):
    """Codes of second moments move by one step where a scale is rounded."""
    eight, full = prepare(**BITS8), prepare()
    state, checkpoints = saved(eight)
    decoded, _ = restore(full, checkpoints)
    chex.assert_trees_all_equal(decoded.opt_state, plain(eight, state))
    with Checkpoints(checkpoints.directory.parent / "float32") as again:
        again.save(1, decoded, full.meta)
    back, _ = restore(eight, again)
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        wide = lambda array: np.asarray(array).astype(np.float64)
        rtol = 0.01 if x.dtype == jnp.bfloat16 else 1e-6
        steps = 1 if x.dtype == jnp.uint8 else 0
        np.testing.assert_allclose(wide(x), wide(y), rtol=rtol, atol=steps)


@pytest.mark.parametrize(
    ("old", "new", "most"),
    [
        (
            {"quant_bits": 8, "quant_block_size": 16},
            {"quant_bits": 4, "quant_block_size": 32},
            0.12,
        ),
        ({}, {"quantize_embeddings": False, "stochastic_rounding": True}, 0.01),
        (GALORE | {"projector_bits": 8}, GALORE | {"projector_bits": 4}, 0.12),
    ],
    ids=["codec", "embeddings", "projector"],
)
def test_one_storage_goes_to_another(saved, old, new, most):
    before, after = prepare(**BITS8, **old), prepare(**BITS8, **new)
    state, checkpoints = saved(before)
    restored, said = restore(after, checkpoints)
    reference, view = plain(before, state), plain(after, restored)
    for x, y in zip(jax.tree.leaves(view), jax.tree.leaves(reference), strict=True):
        size = jnp.linalg.norm(y.astype(jnp.float32))
        assert jnp.linalg.norm((x - y).astype(jnp.float32)) <= most * size
    [line] = said
    assert all(key in line for key in new if key not in GALORE)


def test_without_the_flag_another_storage_is_refused_and_the_flag_named(saved):
    _, checkpoints = saved(prepare())
    with pytest.raises(ValueError, match="other settings") as error:
        resume.restore(prepare(**BITS8, lr=0.5), checkpoints)
    assert "config.use_8bit_optim: stored False, now True" in str(error.value)
    assert "config.lr: stored 0.02, now 0.5" in str(error.value)
    [hint] = [line for line in str(error.value).splitlines() if "--allow" in line]
    assert "use_8bit_optim" in hint and "lr" not in hint
    with pytest.raises(ValueError, match=r"config.lr") as error:
        restore(prepare(**BITS8, lr=0.5), checkpoints)
    assert "use_8bit_optim" not in str(error.value)


def test_the_same_storage_says_nothing_and_gives_the_same_bits(saved):
    run = prepare(**BITS8)
    state, checkpoints = saved(run)
    restored, said = restore(prepare(**BITS8, log_interval=7), checkpoints)
    chex.assert_trees_all_equal(restored, state)
    assert said == []


def test_a_storage_under_which_other_matrices_are_projected_is_refused(saved):
    """A float32 basis of rank 20 for 32 x 32 costs what it saves; one of 8 bits not."""
    values = GALORE | {"galore_rank": 20}
    _, checkpoints = saved(prepare(**values, projector_bits=32))
    with pytest.raises(ValueError, match="projected where that saves bytes") as error:
        restore(prepare(**values, projector_bits=8), checkpoints)
    assert "stored none, wanted (32, 20)" in str(error.value)
    assert "`projector_bits`" in str(error.value)


@pytest.mark.parametrize("name", ["wsd", "cosine", "linear"])
def test_with_other_steps_the_rate_is_that_of_a_run_of_so_many(name, tmp_path):
    old, new = (prepare(total_steps=n, schedule=name) for n in (2, 4))
    state = some_state(old)
    state = state._replace(guard=state.guard._replace(skipped=jnp.int32(0)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, old.meta)
    said = []
    restored = resume.restore(new, checkpoints, say=said.append)
    chex.assert_trees_all_equal(restored, state)
    rates = nj.learning_rates(new.tx, restored.opt_state, new.params)
    was, now = (schedule(run.config, run.config.lr)(1) for run in (old, new))
    assert rates["matrix"] == now
    [line] = said
    assert (
        f"`total_steps` 2 -> 4: from here on the learning rate is that of `{name}`"
        in (line)
    )
    assert f"at {float(now):.3g}, in place of {float(was):.3g}" in line
    assert ("falls from step 3 on" in line) == (name == "wsd")


@pytest.fixture
def tokens(tmp_path):
    """Returns a function that prepares a run on a file of its own tokens."""

    def run(seed, **kwargs):
        path = tmp_path / f"{seed}.bin"
        ids = np.random.default_rng(seed).integers(0, 64, 4000, dtype=np.uint16)
        write_tokens(path, ids, vocab_size=64)
        return prepare(dataset="tokens", data_path=(str(path),), **kwargs)

    return run


def test_other_data_are_refused_unless_that_is_asked_for_and_then_told(saved, tokens):
    state, checkpoints = saved(tokens(0))
    run = tokens(1)
    with pytest.raises(ValueError, match=r"data: stored '.*', now '.*'") as error:
        resume.restore(run, checkpoints)
    assert "`--allow-data-change` lets these differ: data." in str(error.value)
    said = []
    restored = resume.restore(run, checkpoints, allow=["data"], say=said.append)
    chex.assert_trees_all_equal(restored, state)
    [line] = said
    assert "trained from here on other data: data " in line
    assert tokens(0).corpus.fingerprint in line
    assert run.corpus.fingerprint in line
    other = prepare(dataset="synthetic")
    resume.restore(other, checkpoints, allow=["data"], say=said.append)
    assert "config.dataset 'tokens' -> 'synthetic'" in said[-1]
    with pytest.raises(ValueError, match=r"config\.lr: stored 0.02, now 0.5") as error:
        resume.restore(tokens(1, lr=0.5), checkpoints, allow=["data"])
    assert "data:" not in str(error.value)


def test_another_tokenizer_is_refused_unless_that_is_asked_for(saved):
    run = prepare()
    state, checkpoints = saved(run)
    corpus = dataclasses.replace(run.corpus, tokenizer="other")
    other = dataclasses.replace(run, corpus=corpus)
    with pytest.raises(
        ValueError, match=r"tokenizer: stored None, now 'other'"
    ) as error:
        resume.restore(other, checkpoints, allow=["data", "codec"])
    assert "`--allow-tokenizer-change` lets these differ: tokeni" in str(error.value)
    said = []
    restored = resume.restore(other, checkpoints, allow=["tokenizer"], say=said.append)
    chex.assert_trees_all_equal(restored, state)
    assert len(said) == 1
    assert "under another tokenizer: tokenizer " in said[0]


def save_meta(folder, run, **changed):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, some_state(run), run.meta | changed)
    return checkpoints


def test_other_versions_are_told_and_another_format_is_refused(tmp_path):
    run, said = prepare(), []
    versions = run.meta["versions"]
    assert versions.keys() == {
        "python", "jax", "flax", "optax", "orbax-checkpoint", "nanochat-jax"
    }  # fmt: skip
    old = {"versions": versions | {"jax": "0.0.1", "nanochat-jax": "0.0.2"}}
    resume.restore(run, save_meta(tmp_path / "a", run, **old), say=said.append)
    [line] = said
    assert f"versions.jax '0.0.1' -> '{versions['jax']}'" in line
    other = save_meta(tmp_path / "b", run, format=99, **old)
    with pytest.raises(ValueError, match=r"has format 99.*nanochat-jax 0\.0\.2"):
        resume.restore(run, other)


def test_a_setting_that_is_new_since_the_checkpoint_had_its_default(tmp_path):
    run = prepare()
    config = {k: v for k, v in run.meta["config"].items() if k != "min_lr_frac"}
    checkpoints = save_meta(tmp_path, run, config=config)
    assert int(resume.restore(run, checkpoints).step) == 1
    with pytest.raises(ValueError, match=r"min_lr_frac: stored 0\.0, now 0\.1"):
        resume.restore(prepare(min_lr_frac=0.1), checkpoints)


def test_the_record_says_what_the_checkpoint_is_of():
    eight, same, other = prepare(**BITS8), prepare(**BITS8), prepare(log_interval=7)
    assert eight.meta["variant"] == "muon_8bit"
    assert eight.meta["config_hash"] == same.meta["config_hash"]
    assert other.meta["config_hash"] != prepare().meta["config_hash"]


def test_what_may_differ_is_a_setting():
    names = {field.name for field in dataclasses.fields(Config)}
    assert {*resume.RESUMABLE, *resume.STORAGE} <= names
    assert not {*resume.RESUMABLE} & {*resume.STORAGE}
    flags = {field.name for field in dataclasses.fields(Train)}
    assert {f"allow_{change}_change" for change in resume.CHANGES} <= flags


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="saves in the background")
def test_on_processors_a_save_is_on_disk_when_it_returns(tmp_path):
    """Else the next step, whose state is donated, would make a second one."""
    run = prepare()
    state = some_state(run)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, run.meta)
        assert (tmp_path / "1" / "SHA256SUMS").is_file()
        restored = Checkpoints(tmp_path).restore(abstract_state(run))
    chex.assert_trees_all_equal(restored, state)
