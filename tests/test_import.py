"""A run starts from a model that is there already: parameters alone are taken."""

import contextlib
import dataclasses
import io
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from nanochat_jax import cli
from nanochat_jax.commands import command_of
from nanochat_jax.lm import huggingface
from nanochat_jax.lm.checkpoints import Checkpoints, load_trained, open_source
from nanochat_jax.lm.data import dataset_folder
from nanochat_jax.lm.model import gpt, unstack_layers
from nanochat_jax.lm.planning import run_memory
from nanochat_jax.lm.training import init_state

TRAIN = {"dataset": "tokens", "total_steps": 1, "ns_steps": 1, "sample_tokens": 0}
SHAPE = {"n_layers": 2, "vocab_size": 290, "max_seq_len": 32, "weight_tied": False}
IDS = np.arange(40, dtype=np.int32).reshape(2, 20)


def rewrite(folder, file, **changes):
    found = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(found | changes))


def cut_off(folder):
    part = max(folder.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-5])


def without_weights(folder):
    for path in folder.glob("model*"):
        path.unlink()


def larger_tokenizer(folder):
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    found["model"]["vocab"] |= {f"word{i}": 290 + i for i in range(9)}
    path.write_text(json.dumps(found))


BAD = {
    "no weights": (without_weights, "no weights"),
    "part cut off": (cut_off, "damaged or cut off"),
    "part missing": (lambda folder: max(folder.glob("*.safetensors")).unlink(),
                     "no such file"),
    "other shape": (lambda folder: rewrite(folder, "config.json", intermediate_size=48),
                    "must be [48, 32], got"),
    "other architecture": (
        lambda folder: rewrite(folder, "config.json", model_type="gpt2"), "gpt2"
    ),
    "large tokenizer": (larger_tokenizer, "the tokenizer has 299 ids"),
}  # fmt: skip


def call(*args):
    """Runs a command; returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main([str(arg) for arg in args]) == 0
    return out.getvalue()


def refused(capsys, *args):
    with pytest.raises(SystemExit) as error:
        cli.main([str(arg) for arg in args])
    assert error.value.code == 2
    return capsys.readouterr().err


def data_flags(folder):
    return ("--data-path", folder / "data" / "tokens.bin")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on prepared text, stacked and padded, and its weights in other places."""
    folder = tmp_path_factory.mktemp("models")
    texts = ["the cat sat on the mat and the cat did the same " * 5] * 4
    dataset_folder.build_dataset(folder / "data", texts, 280)
    path = tiny.write_config(
        folder, **TRAIN, **SHAPE, scan_layers=True, pad_vocab_to=64
    )
    tokenizer = folder / "data" / "tokenizer.json"
    flags = ("--tokenizer", tokenizer, "--checkpoint-dir", folder / "run")
    call("train", "--config-file", path, *data_flags(folder), *flags)
    call("import", "--from", folder / "run", "--output", folder / "imported")
    weights = folder / "w" / "w.safetensors"
    call("export", "--checkpoint", folder / "imported", "--output", weights)
    shutil.copy(tokenizer, weights.parent)
    call("import", "--from", weights, "--output", folder / "again")
    # Settings of a run that says nothing of a model.
    start = {k: v for k, v in (tiny.RUN | TRAIN).items() if k not in MODEL_KEYS}
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in start.items()]
    (folder / "start.toml").write_text("".join(lines))
    return folder


MODEL_KEYS = {"dim", "n_layers", "n_heads", "ffn_mult", "vocab_size", "max_seq_len"}
SOURCES = ["run/1", "imported", "w/w.safetensors"]


def parsed(folder, *flags):
    args = ["train", "--config-file", folder / "start.toml", *data_flags(folder)]
    return command_of([str(arg) for arg in (*args, *flags)])


def logits(config, params):
    graphdef, _ = gpt.abstract_model(config)
    return jax.jit(lambda params: gpt.apply(graphdef, params, IDS))(params)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(
    "flags",
    [(), ("--no-scan-layers", "--pad-vocab-to", "1"), ("--scan-layers",)],
    ids=["as it is", "apart", "stacked"],
)
def test_parameters_are_those_of_the_model_however_they_are_stored(folder, name, flags):
    command = parsed(folder, "--init-from", folder / name, *flags)
    like = gpt.abstract_model(command)[1]
    params = open_source(folder / name).read(command, like)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, like)
    trained = load_trained(folder / "run")
    chex.assert_trees_all_equal(
        plain(command, params), plain(trained.config, trained.params)
    )


def plain(config, params):
    """Parameters without padding, of blocks one by one."""
    params = gpt.without_padding(config, params)
    return unstack_layers(params) if config.scan_layers else params


def test_the_first_state_gives_the_logits_of_the_model(folder):
    command = parsed(folder, "--init-from", folder / "imported", "--no-scan-layers")
    params = init_state(run_memory.abstract_run(command)).params
    trained = load_trained(folder / "run")
    expected = logits(trained.config, trained.params)
    np.testing.assert_allclose(logits(command, params), expected, atol=2e-6)


def test_import_export_and_import_again_is_equal_to_the_bit(folder):
    first, again = (load_trained(folder / name) for name in ("imported", "again"))
    assert first.fingerprint == again.fingerprint
    chex.assert_trees_all_equal(again.params, plain(first.config, first.params))
    meta = Checkpoints(folder / "again").read_meta()
    assert meta["contains"] == "weights" and "w.safetensors" in meta["source"]


def test_an_imported_model_generates_wherever_it_is_moved(folder, tmp_path):
    moved = shutil.copytree(folder / "imported", tmp_path / "moved")
    flags = ("--prompt", "the cat", "--max-tokens", 4, "--top-k", 1)
    assert call("generate", "--checkpoint", moved, *flags) == call(
        "generate", "--checkpoint", folder / "run", *flags
    )


def test_parameters_are_cast_and_the_state_is_new(folder):
    flags = ("--param-dtype", "bfloat16", "--use-8bit-optim", "--update-in-backward")
    command = parsed(folder, "--init-from", folder / "run", *flags)
    assert command.scan_layers
    run = run_memory.abstract_run(command)
    state = init_state(run)
    wide = load_trained(folder / "run").params
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
    chex.assert_trees_all_equal(state.params, cast)
    chex.assert_trees_all_equal(state.opt_state, run.tx.init(cast))
    assert int(state.step) == 0


# What follows from the model, and what contradicts it


def test_settings_and_tokenizer_follow_from_the_model(folder):
    command = parsed(folder, "--init-from", folder / "imported", "--max-seq-len", 8)
    stored = load_trained(folder / "run").config
    for key in ("dim", "n_layers", "ffn_mult", "vocab_size", "weight_tied"):
        assert getattr(command, key) == getattr(stored, key)
    assert command.tokenizer == str(folder / "imported" / "tokenizer.json")
    assert command.max_seq_len == 8


def start(folder, *flags):
    return [
        "train",
        "--config-file",
        folder / "start.toml",
        *data_flags(folder),
        *flags,
    ]


def test_settings_that_contradict_the_model_are_refused_in_one_message(folder, capsys):
    flags = ("--dim", 64, "--n-layers", 3, "--max-seq-len", 64, "--vocab-size", 300)
    said = refused(capsys, *start(folder, "--init-from", folder / "run", *flags))
    for line in (
        "dim: stored 32, wanted 64",
        "n_layers: stored 2, wanted 3",
        "max_seq_len: stored 32, wanted 64",
        "vocab_size: stored 290, wanted 300",
    ):
        assert line in said
    assert said.count("error:") == 1 and "ffn_mult" not in said


def test_ids_of_another_tokenizer_are_refused_unless_it_is_given(
    folder, tmp_path, capsys
):
    dataset_folder.build_dataset(
        tmp_path / "data", ["other text, many words " * 9] * 4, 270
    )
    command = [
        "train", "--config-file", folder / "start.toml", *data_flags(tmp_path),
        "--init-from", folder / "run", "--checkpoint-dir", tmp_path / "run",
    ]  # fmt: skip
    assert "tokenizer" in refused(capsys, *command)
    assert not (tmp_path / "run").exists()
    other = ("--tokenizer", tmp_path / "data" / "tokenizer.json")
    assert "Start:" in call(*command, *other)


def test_a_run_resumes_without_its_first_model_and_refuses_another(
    folder, tmp_path, capsys
):
    first = shutil.copytree(folder / "imported", tmp_path / "first")
    steps = ("--total-steps", 2, "--checkpoint-interval", 1)
    run, again = tmp_path / "run", tmp_path / "again"
    command = start(folder, *steps, "--init-from", first)
    tokenizer = ("--tokenizer", folder / "data" / "tokenizer.json")
    call(*command, *tokenizer, "--checkpoint-dir", run)
    shutil.rmtree(first)
    resumed = ("--resume", run / "1", "--checkpoint-dir", again)
    assert "Resumed from step 1" in call(*command, *tokenizer, *resumed)
    metas = [Checkpoints(x).read_meta()["config"] for x in (run, again)]
    assert metas[0] == metas[1] and metas[0]["init_from"] == str(first)
    shutil.rmtree(again)
    assert "Resumed" in call(*start(folder, *steps, *tokenizer, *resumed))
    said = refused(capsys, *start(folder, "--init-from", folder / "run", *resumed))
    assert "started from" in said and "Leave `--init-from` out" in said


# What is refused


def test_weights_alone_cannot_be_resumed(folder, capsys):
    said = refused(capsys, *start(folder, "--resume", folder / "imported"))
    assert "without the state of an optimizer" in said and "--init-from" in said


def test_what_is_no_model_is_refused_and_nothing_is_written(folder, tmp_path, capsys):
    output = tmp_path / "out" / "model"
    command = lambda source: ("import", "--from", source, "--output", output)
    assert "no model is there" in refused(capsys, *command(tmp_path))
    copy = shutil.copytree(folder / "w", tmp_path / "w")
    record = json.loads((copy / "w.json").read_text())
    changed = record | {"config": record["config"] | {"dim": 16}}
    (copy / "w.json").write_text(json.dumps(changed))
    assert "blocks.0" in refused(capsys, *command(copy / "w.safetensors"))
    (copy / "w.json").write_text(json.dumps(record))
    small = record | {"config": record["config"] | {"vocab_size": 9}}
    (copy / "w.json").write_text(json.dumps(small))
    assert "embed.embedding" in refused(capsys, *command(copy / "w.safetensors"))
    damaged = shutil.copytree(folder / "imported", tmp_path / "damaged")
    file = max((damaged / "0").rglob("*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-9])
    assert "damaged checkpoint" in refused(capsys, *command(damaged))
    assert not output.parent.exists()


def test_a_folder_with_files_is_not_written_over(folder, capsys):
    command = ("import", "--from", folder / "run", "--output", folder / "w")
    assert "is there already" in refused(capsys, *command)


def test_the_shape_comes_from_one_place(folder, capsys):
    said = refused(capsys, *start(folder, "--init-from", folder / "run", "--depth", 2))
    assert "`init_from` and `depth` both give the shape" in said


# Hugging Face folders


@pytest.fixture(scope="module")
def published(folder):
    """A Hugging Face folder of the model, in two parts."""
    trained = load_trained(folder / "run")
    huggingface.write_folder(
        folder / "hf",
        trained.config,
        trained.params,
        tokenizer=folder / "data" / "tokenizer.json",
        max_part_bytes=60_000,
    )
    return folder / "hf"


def test_a_hugging_face_folder_goes_in_and_out_equal_to_the_bit(
    folder, published, tmp_path
):
    call("import", "--from", published, "--output", tmp_path / "in")
    first = load_trained(tmp_path / "in")
    again = tmp_path / "again"
    huggingface.write_folder(
        again, first.config, first.params, tokenizer=first.tokenizer_file
    )
    read = lambda path: open_source(path).read(
        first.config, gpt.abstract_model(first.config)[1]
    )
    chex.assert_trees_all_equal(read(again), read(published))
    assert first.fingerprint == open_source(again).fingerprint
    trained = load_trained(folder / "run")
    np.testing.assert_allclose(
        logits(first.config, first.params),
        logits(trained.config, trained.params),
        atol=2e-6,
    )
    flags = ("--prompt", "the cat", "--max-tokens", 4, "--top-k", 1)
    assert "the cat" in call("generate", "--checkpoint", tmp_path / "in", *flags)


def test_a_run_starts_from_a_hugging_face_folder(folder, published, tmp_path):
    flags = ("--init-from", published, "--param-dtype", "bfloat16", "--scan-layers")
    command = parsed(folder, *flags)
    assert command.tokenizer == str(published / "tokenizer.json")
    params = init_state(run_memory.abstract_run(command)).params
    config = dataclasses.replace(command, pad_vocab_to=64)
    trained = load_trained(folder / "run")
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained.params)
    gains = {"query_norm", "key_norm"}
    blocks = {**params["blocks"]}
    blocks["attention"] = {
        key: x for key, x in blocks["attention"].items() if key not in gains
    }
    chex.assert_trees_all_equal(
        plain(command, params | {"blocks": blocks}), plain(config, cast)
    )
    call(*start(folder, *flags, "--checkpoint-dir", tmp_path / "run"))


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_cannot_be_read_is_one_message_and_nothing_is_written(
    name, published, tmp_path, capsys
):
    copy, output = shutil.copytree(published, tmp_path / "copy"), tmp_path / "out"
    spoil, told = BAD[name]
    spoil(copy)
    for command in (
        ("import", "--from", copy, "--output", output),
        start(published.parent, "--init-from", copy, "--checkpoint-dir", output),
    ):
        said = refused(capsys, *command)
        assert said.count("error:") == 1 and told in said
        assert not output.exists()
