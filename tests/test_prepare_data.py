"""`prepare-data`: what it writes is whole, exact, and trains."""

import hashlib
import json
import os

import numpy as np
import pytest

from nanochat_jax import cli
from nanochat_jax.lm.data import bpe, corpus, dataset_folder, documents, token_file
from nanochat_jax.lm.data.end_token import END_OF_TEXT
from nanochat_jax.lm.data.tokenizer import (
    ByteTokenizer,
    TrainedTokenizer,
    load_tokenizer,
)

WORDS = ("the cat", "sat", "on a mät", "\n\n", "日本", "🦊", END_OF_TEXT, "a \0 b")
FILES = ["tokenizer.json", "tokens.bin", "tokens.bin.json"]


def make_texts(count=40):
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 30)) + f" {i}" for i in range(count)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for index, text in enumerate(make_texts()):
        (folder / f"{index:02}.txt").write_bytes(text.encode())
    return folder


def run(source, output, *args):
    flags = ["--text", source, "--output", output, "--vocab-size", 300, *args]
    return cli.main(["prepare-data", *map(str, flags)])


@pytest.fixture(scope="module")
def prepared(source):
    assert run(source, source.parent / "prepared") == 0
    return source.parent / "prepared"


def facts_of(folder):
    return json.loads((folder / "tokens.bin.json").read_text())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(capsys, *args):
    with pytest.raises(SystemExit) as error:
        cli.main(["prepare-data", *map(str, args)])
    assert error.value.code == 2
    return capsys.readouterr().err


def test_the_sidecar_describes_the_files(prepared):
    tokens = np.fromfile(prepared / "tokens.bin", "<u4")
    facts = facts_of(prepared)
    content = (prepared / "tokenizer.json").read_bytes()
    assert facts["tokenizer"] == hashlib.sha256(content).hexdigest()
    assert facts["dtype"] == "uint32" and facts["tokens"] == len(tokens)
    assert facts["vocab_size"] == len(facts["token_bytes"]) == 300
    sizes = np.array(facts["token_bytes"])
    assert sizes[tokens].sum() == corpus.count_bytes(make_texts())


def test_the_tokens_are_the_documents_those_held_out_last(prepared):
    tokens = np.fromfile(prepared / "tokens.bin", "<u4")
    tokenizer = load_tokenizer(prepared / "tokenizer.json")
    ends = np.flatnonzero(tokens == tokenizer.separator)
    texts = [tokenizer.decode(part[:-1]) for part in np.split(tokens, ends + 1)[:-1]]
    kept, held_out = documents.split(make_texts())
    assert texts == kept + held_out
    assert ends[len(kept) - 1] + 1 == len(tokens) - facts_of(prepared)["held_out"]


def test_it_says_how_to_train_on_it(source, tmp_path, capsys):
    assert run(source, tmp_path / "new") == 0
    out = capsys.readouterr().out
    assert f"--tokenizer {tmp_path / 'new' / 'tokenizer.json'} --vocab-size 300" in out
    assert "Training the tokenizer: 38 documents" in out
    assert "\x1b" not in out


def test_the_same_text_gives_the_same_files(source, prepared, tmp_path):
    assert run(source, tmp_path / "again") == 0
    assert contents(tmp_path / "again") == contents(prepared)


def test_bits_per_byte_are_of_the_held_out_text(prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer.json")
    load = lambda **kwargs: corpus.load_corpus(
        "tokens", [prepared / "tokens.bin"], vocab_size=300, **kwargs
    )
    held_out = documents.split(make_texts())[1]
    loaded = load(tokenizer=tokenizer)
    assert loaded.bytes_per_token is not None
    size = loaded.bytes_per_token * len(loaded.val)
    assert size == pytest.approx(corpus.count_bytes(held_out))
    assert load(tokenizer=ByteTokenizer()).tokenizer == tokenizer.fingerprint
    other = TrainedTokenizer(bpe.train(["other text"], 260))
    with pytest.raises(ValueError, match=f"{tokenizer.fingerprint}, but the one given"):
        load(tokenizer=other)
    longer = load(tokenizer=tokenizer, seq_len=len(loaded.val) + 50)
    assert len(longer.val) == len(loaded.val) + 51


def test_only_documents_end_in_the_separator():
    tokenizer = TrainedTokenizer(bpe.train(make_texts(), 300))
    ids = tokenizer.encode(f"{END_OF_TEXT} {END_OF_TEXT}")
    assert tokenizer.separator not in ids
    assert tokenizer.decode(ids) == f"{END_OF_TEXT} {END_OF_TEXT}"


def test_a_vocabulary_has_no_merges_that_occur_once():
    text = bpe.train(["ab cd"], 1000)
    assert TrainedTokenizer(text).vocab_size == bpe.MIN_VOCAB_SIZE
    assert bpe.token_bytes(text) == [1] * bpe.MIN_VOCAB_SIZE


def test_a_folder_with_contents_is_replaced_on_demand_only(
    source, prepared, tmp_path, capsys
):
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "tokens.bin").write_text("old")
    flags = ["--text", source, "--output", folder, "--vocab-size", 300]
    message = refused(capsys, *flags)
    assert "is not empty, it has notes.txt, tokens.bin" in message
    assert "--force" in message
    assert (folder / "tokens.bin").read_text() == "old"
    assert run(source, folder, "--force") == 0
    assert contents(folder) == {**contents(prepared), "notes.txt": b"mine"}


@pytest.mark.parametrize("old", [False, True])
def test_all_is_written_or_nothing(source, tmp_path, monkeypatch, old):
    folder = tmp_path / "out"
    if old:
        folder.mkdir()
        (folder / "tokens.bin").write_text("old")

    def fail(*args, **kwargs):
        raise OSError("disk is full")

    monkeypatch.setattr(token_file, "write_tokens", fail)
    with pytest.raises(OSError, match="full"):
        dataset_folder.build_dataset(folder, make_texts(), 300, force=True)
    assert os.listdir(tmp_path) == (["out"] if old else [])
    if old:
        assert contents(folder) == {"tokens.bin": b"old"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "either `--text PATH...` or `--dataset stdlib`"),
        (("--dataset", "stdlib", "--text", "x"), "either `--text PATH...` or"),
        (("--text", "x", "--vocab-size", 256), "at least 257, got 256"),
        (("--text", "missing.txt"), "missing.txt"),
    ],
)
def test_what_cannot_be_prepared_is_refused(args, message, tmp_path, capsys):
    flags = ["--output", tmp_path / "new", "--vocab-size", 300, *args]
    assert message in refused(capsys, *flags)
    assert os.listdir(tmp_path) == []


def test_text_without_content_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no text"):
        dataset_folder.build_dataset(tmp_path / "new", [], 300)
