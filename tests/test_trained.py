"""`generate` and `export`: what a checkpoint gives back, from one tiny run."""

import contextlib
import io
import json
import math
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, strategies as st

from nanochat_jax import cli
from nanochat_jax.config import Config
from nanochat_jax.lm.checkpoints import weights_file
from nanochat_jax.lm.checkpoints.pretrained import load_trained
from nanochat_jax.lm.checkpoints.store import Checkpoints
from nanochat_jax.lm.data import dataset_folder
from nanochat_jax.lm.data.detokenize import cut_at, decode_stream, up_to
from nanochat_jax.lm.data.tokenizer import ByteTokenizer
from nanochat_jax.lm.model import gpt
from nanochat_jax.lm.model.sampling import generate
from nanochat_jax.lm.tracking.jsonl import read_metrics
from tiny import write_config

SETTINGS = {
    "n_layers": 2, "max_seq_len": 32, "vocab_size": 300, "dataset": "tokens",
    "total_steps": 2, "sample_tokens": 5, "sample_prompt": "the cat",
}  # fmt: skip
BYTES = ByteTokenizer()
TEXT = st.text(st.sampled_from("ab\né日🦊"), max_size=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run on prepared text, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("trained")
    texts = ["the cat sat on the mät 🦊 and the cat did 日本 " * 5] * 4
    dataset_folder.build_dataset(folder / "data", texts, 290)
    flags = {
        "--config-file": write_config(folder, **SETTINGS),
        "--data-path": folder / "data" / "tokens.bin",
        "--tokenizer": folder / "data" / "tokenizer.json",
        "--checkpoint-dir": folder / "run",
    }
    with contextlib.redirect_stdout(io.StringIO()) as out:
        args = [str(word) for pair in flags.items() for word in pair]
        assert cli.main(["train", *args]) == 0
    (folder / "out.txt").write_text(out.getvalue())
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    return load_trained(folder / "run")


def generated(capsys, folder, *args):
    run = str(folder / "run")
    assert cli.main(["generate", "--checkpoint", run, *map(str, args)]) == 0
    return capsys.readouterr().out


def refused(capsys, *args):
    with pytest.raises(SystemExit) as error:
        cli.main([str(arg) for arg in args])
    assert error.value.code == 2
    return capsys.readouterr().err


# What a run on prepared tokens records


def test_a_run_on_prepared_tokens_measures_bits_per_byte(folder):
    facts = json.loads((folder / "data" / "tokens.bin.json").read_text())
    tokens = np.fromfile(folder / "data" / "tokens.bin", "<u4")
    last = tokens[-max(facts["held_out"], 33) :]
    ratio = np.array(facts["token_bytes"])[last].mean()
    for line in read_metrics(folder / "run" / "metrics.jsonl"):
        assert line["val_bpb"] == pytest.approx(line["val_loss"] / math.log(2) / ratio)


def test_a_run_on_prepared_tokens_ends_with_a_sample_of_text(folder):
    assert "\nA sample:\nthe cat" in (folder / "out.txt").read_text()


def test_only_the_parameters_are_read(folder, trained):
    whole = Checkpoints(folder / "run").read_meta()
    assert trained.fingerprint == whole["tokenizer"]
    assert trained.step == 2 and trained.config.dim == 32
    again = load_trained(folder / "run" / "2").params
    same = jax.tree.map(lambda a, b: bool((a == b).all()), trained.params, again)
    assert all(jax.tree.leaves(same))
    bad = {"params": {"embed": {"embedding": jax.numpy.zeros((3, 3))}}}
    with pytest.raises(ValueError, match="params/embed"):
        Checkpoints(folder / "run").restore(bad, partial=True)


# Text as it is made


@given(st.lists(st.integers(0, 255), max_size=40))
def test_a_stream_is_the_text_in_pieces(ids):
    pieces = list(decode_stream(BYTES, ids))
    assert "".join(pieces) == BYTES.decode(ids)
    assert all(pieces)


@given(TEXT, TEXT)
def test_a_stream_never_splits_a_character(prompt, text):
    ids, seen = list(text.encode()), []
    stream = decode_stream(BYTES, (seen.append(i) or i for i in ids), prompt.encode())
    done = ""
    for piece in stream:
        done += piece
        # Nothing waits that could be told already.
        assert done == bytes(seen).decode(errors="ignore")
    assert done == text


def first_ending(text, stops):
    """The text up to the stop that ends first, the longest of those that do."""
    for end in range(len(text) + 1):
        ending = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(ending)]
    return text


@given(
    st.lists(st.text("abc", max_size=4), max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=3), max_size=3),
)
def test_text_is_cut_where_the_first_stop_ends_however_it_comes(pieces, stops):
    cut = list(cut_at(pieces, stops))
    assert "".join(cut) == first_ending("".join(pieces), stops)
    assert all(cut)


def test_no_more_tokens_are_asked_for_after_the_end():
    tokens = iter([5, 7, 0, 3])
    assert list(up_to(tokens, 0)) == [5, 7]
    assert next(tokens) == 3


def test_no_more_is_asked_for_after_a_stop():
    pieces = iter(["a", "bst", "op", "never"])
    assert list(cut_at(pieces, ["stop"])) == ["a", "b"]
    assert next(pieces) == "never"


# generate


def test_it_prints_what_the_model_continues(folder, trained, capsys):
    out = generated(capsys, folder, "--prompt", "the", "--seed", 3)
    tokenizer = trained.load_tokenizer()
    prompt = tokenizer.encode("the").tolist()
    tokens = generate(
        trained.graphdef,
        trained.params,
        trained.config,
        prompt,
        max_tokens=32 - len(prompt),
        temperature=0.8,
        seed=3,
    )
    tokens = up_to(tokens, tokenizer.separator)
    assert out == tokenizer.decode([*prompt, *tokens]) + "\n"
    assert out == generated(capsys, folder, "--prompt", "the", "--seed", 3)
    assert out != generated(capsys, folder, "--prompt", "the", "--seed", 4)


def test_flags_shape_the_text(folder, capsys):
    text = lambda *args: generated(capsys, folder, "--prompt", "the cat", *args)
    whole = text("--temperature", 0)
    assert whole == text("--top-k", 1, "--seed", 9)
    short = text("--temperature", 0, "--max-tokens", 5).rstrip("\n")
    assert whole.startswith(short.rstrip("\ufffd")) and len(short) < len(whole)
    stop = whole[len("the cat") + 3 : -1][:4]
    assert text("--temperature", 0, "--stop", stop, "zzz") == (
        "the cat" + first_ending(whole[len("the cat") : -1], [stop]) + "\n"
    )


def test_without_a_prompt_a_document_begins(folder, capsys):
    assert generated(capsys, folder, "--max-tokens", 3, "--top-k", 1) != "\n"


def test_a_tokenizer_that_moved_is_found_and_another_is_refused(
    folder, tmp_path, capsys
):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = folder / "data" / "tokenizer.json"
    command = ["generate", "--checkpoint", copy / "run", "--max-tokens", 1]
    file.rename(tmp_path / "moved.json")
    try:
        assert "tokenizer.json: no such file" in refused(capsys, *command)
        moved = [*command, "--tokenizer", tmp_path / "moved.json"]
        assert cli.main([str(arg) for arg in moved]) == 0
        file.write_bytes((tmp_path / "moved.json").read_bytes() + b" ")
        message = refused(capsys, *command)
        assert "the model was trained on ids of the tokenizer" in message
        assert "--tokenizer" in message
    finally:
        (tmp_path / "moved.json").replace(file)


def test_what_cannot_be_generated_is_one_message(folder, tmp_path, capsys):
    told = lambda *args: refused(
        capsys, "generate", "--checkpoint", folder / "run", *args
    )
    assert "must fit into 32 tokens, got 60 + 1" in told("--prompt", "c " * 30)
    assert "must fit into 32 tokens" in told("--max-tokens", 32)
    assert "`top_k` must be at least 1" in told("--top-k", 0)
    assert "`temperature` must not be negative" in told("--temperature", -1)
    assert "`--seed` must be from 0" in told("--seed", -1)
    assert "`--stop` must not be" in told("--stop", "")
    message = refused(capsys, "generate", "--checkpoint", tmp_path / "none")
    assert message.count("\n") == 1 and "no checkpoint is there" in message


# export


@pytest.fixture(scope="module")
def exported(folder):
    path = folder / "out" / "weights.safetensors"
    args = ["export", "--checkpoint", str(folder / "run"), "--output", str(path)]
    assert cli.main(args) == 0
    return path


def copied(exported, tmp_path):
    return shutil.copytree(exported.parent, tmp_path / "copy") / exported.name


def test_exported_weights_give_the_same_logits_to_the_bit(exported, trained):
    config, params = weights_file.load(exported)
    assert config == trained.config
    tokens = np.arange(64).reshape(2, 32)
    logits = jax.jit(lambda params: gpt.apply(trained.graphdef, params, tokens))
    assert (logits(params) == logits(trained.params)).all()
    structure = jax.tree.structure(trained.params)
    assert jax.tree.structure(params) == structure


def test_the_files_say_what_they_are(exported, trained):
    assert sorted(path.name for path in exported.parent.iterdir()) == [
        "weights.json",
        "weights.safetensors",
    ]
    weights = safetensors.numpy.load_file(exported)
    kernel = trained.params["blocks"][1]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(weights["blocks.1.attention.query.kernel"], kernel)
    record = json.loads((exported.parent / "weights.json").read_text())
    assert record["step"] == 2 and record["tokenizer"] == trained.fingerprint
    assert record["config"]["n_layers"] == 2
    assert {"python", "jax", "nanochat-jax"} <= record["versions"].keys()


def test_equal_weights_make_equal_files(exported, trained, tmp_path):
    path = tmp_path / "again.safetensors"
    # Settings of training, which a `Config` has too, are left out.
    config = Config(**vars(trained.config), lr=0.5)
    facts = {"step": trained.step, "tokenizer": trained.fingerprint}
    weights_file.save(path, config, trained.params, **facts)
    assert path.read_bytes() == exported.read_bytes()
    beside = (path.with_suffix(".json"), exported.with_suffix(".json"))
    assert beside[0].read_text() == beside[1].read_text()


def test_files_that_do_not_belong_together_are_refused(exported, tmp_path):
    path = copied(exported, tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="their checksums differ"):
        weights_file.load(path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(ValueError, match=r"weights\.json: not written by `export`"):
        weights_file.load(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"no such file: .*weights\.json"):
        weights_file.load(path)


def test_weights_of_other_settings_are_refused(exported, tmp_path):
    path = copied(exported, tmp_path)
    beside = path.with_suffix(".json")
    record = json.loads(beside.read_text())
    beside.write_text(json.dumps(record | {"config": record["config"] | {"dim": 16}}))
    with pytest.raises(ValueError, match=r"blocks.0.*: stored .*\[32,32\], wanted"):
        weights_file.load(path)


def test_a_crash_leaves_the_old_files(exported, trained, tmp_path, monkeypatch):
    path = copied(exported, tmp_path)
    before = path.read_bytes()

    def fail(weights, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk is full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="full"):
        weights_file.save(
            path, trained.config, trained.params, step=9, tokenizer="bytes"
        )
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 2


def test_export_refuses_before_it_reads(folder, tmp_path, capsys):
    command = ["export", "--checkpoint", tmp_path / "none", "--output"]
    assert "must end in .safetensors" in refused(capsys, *command, tmp_path / "w.bin")
    path = tmp_path / "w.safetensors"
    assert "no checkpoint is there" in refused(capsys, *command, path)
    assert list(tmp_path.iterdir()) == []
