"""Tokenizers, corpora and batches: laws of splitting, order and refusal."""

import json
import math
import os
import threading

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings, strategies as st

from nanochat_jax.lm.data import (
    corpus,
    documents,
    markov_chain,
    token_file,
    tokenizer,
)
from nanochat_jax.lm.data.batches import Batches, eval_batches
from nanochat_jax.lm.data.end_token import END_OF_TEXT

BYTES = tokenizer.ByteTokenizer()


@pytest.fixture(scope="module")
def stdlib():
    return corpus.load_corpus("stdlib", tokenizer=BYTES, vocab_size=256)


def load(name, *paths, vocab_size=256, **kwargs):
    kwargs = {"tokenizer": BYTES, "vocab_size": vocab_size, **kwargs}
    return corpus.load_corpus(name, paths, **kwargs)


def trained_tokenizer(path, special_tokens=(END_OF_TEXT,), end_token=None):
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special_tokens),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["the cat sat on the mat, the cat did"] * 20, trainer)
    model.enable_truncation(4)  # must not cut what the trainer encodes
    model.save(str(path))
    return tokenizer.load_tokenizer(path, end_token)


def write_texts(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    for index, text in enumerate(texts):
        (folder / f"{index:03}.txt").write_text(text, encoding="utf-8")
    return folder


# Tokenizers


@given(st.text())
def test_byte_tokenizer_round_trip(text):
    ids = BYTES.encode(text)
    assert BYTES.decode(ids) == text
    assert len(ids) == len(text.encode()) and ids.dtype == np.uint8


@given(st.lists(st.integers(0, 400)))
def test_byte_tokenizer_decodes_any_ids(ids):
    assert BYTES.decode(ids).count("\ufffd") >= any(i > 255 for i in ids)
    assert BYTES.decode(np.array(ids, np.int32)) == BYTES.decode(ids)


@given(st.text())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_trained_tokenizer_round_trip(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    wrapped = trained_tokenizer(path) if not path.exists() else None
    wrapped = wrapped or tokenizer.load_tokenizer(path)
    ids = wrapped.encode(text)
    assert wrapped.decode(ids) == text
    assert ids.max(initial=0) < wrapped.vocab_size


def test_trained_tokenizer_separator(tmp_path):
    with_token = trained_tokenizer(tmp_path / "a.json")
    assert with_token.decode([with_token.separator]) == END_OF_TEXT
    without = trained_tokenizer(tmp_path / "b.json", special_tokens=())
    assert without.decode([without.separator]) == "\0"


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")


@pytest.mark.parametrize(
    ("special", "config", "said", "end"),
    [
        (SPECIAL, None, None, "<|endoftext|>"),
        (SPECIAL, {"eos_token": "<|im_end|>"}, None, "<|im_end|>"),
        (SPECIAL, {"eos_token": "<|im_end|>"}, "<unk>", "<unk>"),
        (SPECIAL, {"eos_token": None}, None, "<|endoftext|>"),
        (SPECIAL[1:], None, None, "<|im_end|>"),
        (("<s>", "</s>"), {}, None, "</s>"),
        (("<s>", "</s>"), {"eos_token": {"content": "<s>"}}, None, "<s>"),
        (("<|end_of_text|>", "<|eot_id|>"), None, None, "<|end_of_text|>"),
    ],
)
def test_a_document_ends_in_the_end_token_of_its_tokenizer(
    tmp_path, special, config, said, end
):
    path = tmp_path / "tokenizer.json"
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    trained_tokenizer(path, special, end_token=end)
    wrapped = tokenizer.load_tokenizer(path, said)
    assert wrapped.decode([wrapped.separator]) == end
    assert corpus.encode_documents(["cat"], wrapped)[-1] == wrapped.separator


@pytest.mark.parametrize(
    ("special", "config", "said", "message"),
    [
        (("</s>", "<eos>"), None, None, "several tokens may end a document: </s>, <eo"),
        (("<unk>", "<pad>"), None, None, "its special tokens are <pad>, <unk>"),
        (SPECIAL, {"eos_token": "</s>"}, None, "has no token </s> to end"),
        (SPECIAL, None, "<|end|>", "has no token <|end|>"),
        (SPECIAL, [], None, "tokenizer_config.json: cannot be read"),
    ],
)
def test_an_end_token_that_is_not_known_is_asked_for(
    tmp_path, special, config, said, message
):
    path = tmp_path / "tokenizer.json"
    trained_tokenizer(path, special, end_token=special[0])
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"tokenizer.*json: ") as error:
        tokenizer.load_tokenizer(path, said)
    assert message in str(error.value)


def test_bytes_have_no_end_token_to_choose():
    with pytest.raises(ValueError, match="`end_token` is for a `tokenizer`"):
        tokenizer.load_tokenizer(None, "</s>")


@pytest.mark.parametrize("content", [None, b"{}", b"\xff\xfe", b"not json"])
def test_bad_tokenizer_file_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: (no such|not a|cannot)"):
        tokenizer.load_tokenizer(path)


# Corpora from text


def test_stdlib_is_stable_and_large(stdlib):
    again = load("stdlib")
    assert stdlib.fingerprint == again.fingerprint
    np.testing.assert_array_equal(stdlib.val, again.val)
    assert len(stdlib.train) > 1e6 and len(stdlib.val) > 1e5
    assert stdlib.bytes_per_token == 1.0


def test_stdlib_splits_whole_files(stdlib):
    whole = documents.stdlib_documents()
    kept, held_out = documents.split(whole)
    assert sorted(kept + held_out) == sorted(whole)
    assert not set(kept) & set(held_out)
    assert len(stdlib.train) + len(stdlib.val) == corpus.count_bytes(whole)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=60), st.integers(1, 30))
def test_split_keeps_every_character_once(texts, least):
    kept, held_out = documents.split(texts, least)
    if len(set(texts)) >= documents.MIN_DOCUMENTS:
        assert sorted(kept + held_out) == sorted(texts)
        assert held_out and not set(kept) & set(held_out)
    else:
        total = "".join(texts)
        assert "".join(kept) + "".join(held_out) == total
        assert len("".join(held_out)) == min(
            len(total), max(least, round(len(total) / 20))
        )


def test_split_does_not_depend_on_order_or_place(tmp_path):
    texts = [f"text {i}" for i in range(40)]
    there = documents.text_documents([write_texts(tmp_path / "a" / "b", texts)])
    held = documents.split(there)[1]
    assert sorted(documents.split(texts[::-1])[1]) == sorted(held)
    assert len(held) == 2


def test_text_reads_each_file_once_in_order(tmp_path):
    folder = write_texts(tmp_path / "in", ["one", "two", ""])
    write_texts(folder / "deep", ["three"])
    write_texts(folder / ".git", ["hidden"])
    found = documents.text_documents([folder / "001.txt", folder])
    assert found == ["two", "one", "three"]


def test_text_corpus_with_trained_tokenizer(tmp_path):
    wrapped = trained_tokenizer(tmp_path / "tokenizer.json")
    text = "the cat sat on the mät. " * 50
    folder = write_texts(tmp_path / "in", [text, text])
    loaded = load("text", folder, tokenizer=wrapped, vocab_size=320)
    kept = wrapped.decode(loaded.train).replace(END_OF_TEXT, "")
    held_out = wrapped.decode(loaded.val).replace(END_OF_TEXT, "")
    assert kept + held_out == text + text
    assert loaded.bytes_per_token is not None
    in_bytes = len(held_out.encode()) + 1  # and the separator
    assert loaded.bytes_per_token * len(loaded.val) == pytest.approx(in_bytes)


def test_bad_texts_are_all_named(tmp_path):
    folder = write_texts(tmp_path / "in", ["fine"])
    (folder / "a.bin").write_bytes(b"\xff\xfe")
    (folder / "b.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match="UTF-8") as error:
        load("text", folder, folder / "missing.txt")
    message = str(error.value)
    assert "a.bin: not UTF-8" in message and "b.bin: not UTF-8" in message
    assert "missing.txt: cannot be read" in message and "000.txt" not in message


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no files in this folder"):
        load("text", tmp_path)


@pytest.mark.parametrize(
    ("name", "paths", "message"),
    [
        ("stdlib", ["x"], "data_path"),
        ("text", [], "data_path"),
        ("tokens", ["x", "y"], "x: no such file.*\ny: no such"),
        ("tokens", ["missing.bin"], "no such file"),
        ("wiki", [], "must be one of"),
    ],
)
def test_bad_requests_are_refused(name, paths, message):
    with pytest.raises(ValueError, match=message):
        load(name, *paths)


def test_too_large_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"256 ids, but the model's .* 100"):
        load("stdlib", vocab_size=100)


def test_too_little_text_names_the_split_and_lengths(tmp_path):
    folder = write_texts(tmp_path / "in", ["abc"])
    with pytest.raises(ValueError, match=r"training split has 0 tokens.*= 9"):
        load("text", folder, seq_len=8)


# Token files


def tokens_of(length, vocab_size=1000):
    return np.random.default_rng(0).integers(0, vocab_size, length)


def with_header(magic, version, tokens, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + tokens.tobytes()


def test_token_file_round_trip(tmp_path):
    path, tokens = tmp_path / "tokens.bin", tokens_of(1001)
    sizes = tokens_of(1000, vocab_size=9).tolist()
    token_file.write_tokens(
        path, tokens, vocab_size=1000, held_out=70, token_bytes=sizes, tokenizer="f"
    )
    assert path.read_bytes() == tokens.astype("<u4").tobytes()
    loaded = load("tokens", path, vocab_size=1000, seq_len=64)
    np.testing.assert_array_equal(np.r_[loaded.train, loaded.val], tokens)
    assert len(loaded.val) == 70 and isinstance(loaded.train, np.memmap)
    assert loaded.tokenizer == "f"
    assert loaded.bytes_per_token == np.array(sizes)[tokens[-70:]].mean()
    assert sorted(os.listdir(tmp_path)) == ["tokens.bin", "tokens.bin.json"]


@pytest.mark.parametrize(
    ("layout", "token_dtype"),
    [("raw", "uint16"), ("raw", "uint32"), ("gpt2", None), ("llama3", None)],
)
def test_token_layouts(tmp_path, layout, token_dtype):
    path, tokens = tmp_path / "tokens.bin", tokens_of(500)
    path.write_bytes(
        {
            "raw": tokens.astype(token_dtype or "<u4").tobytes(),
            "gpt2": with_header(20240520, 1, tokens.astype("<u2")),
            "llama3": with_header(20240801, 7, tokens.astype("<u4")),
        }[layout]
    )
    file = token_file.read_tokens(path, vocab_size=1000, token_dtype=token_dtype)
    np.testing.assert_array_equal(file.tokens, tokens)
    assert file.token_bytes is None and file.count_bytes(0) is None


@given(st.integers(0, 99), st.integers(50, 2**32 - 1), st.integers(1, 120))
def test_id_out_of_range_names_position_and_id(at, bad, chunk):
    tokens = np.zeros(100, np.uint32)
    tokens[at] = bad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_file.checks, "CHECK_CHUNK", chunk)
        with pytest.raises(ValueError, match=rf"file: token {at} .*id {bad},.* 49\."):
            token_file.check_ids(tokens, 50, "file")
        token_file.check_ids(tokens, bad + 1, "file")


@pytest.mark.parametrize(
    ("content", "sidecar", "token_dtype", "message"),
    [
        (b"", {}, None, "holds no tokens"),
        (b"\0" * 7, {}, None, "multiple of 4"),
        (b"\0" * 7, {}, "uint16", "multiple of 2"),
        (b"\0" * 8, {}, "int8", "'int8'"),
        (b"\0" * 8, {"dtype": "uint16"}, "uint32", "tokens.bin.json says 'uint16'"),
        (b"\0" * 8, {"tokens": 3}, None, "`tokens` is 3"),
        (b"\0" * 8, {"tokens": "2"}, None, "`tokens` is '2'"),
        (b"\0" * 8, {"dtype": ["uint16"]}, None, "`dtype` must be a name"),
        (b"\0" * 8, {"vocab_size": 11}, None, "`vocab_size` is 11"),
        (b"\0" * 8, {"held_out": 3}, None, "from 0 to 2, got 3"),
        (b"\0" * 8, {"token_bytes": [1, -1]}, None, "list of the bytes"),
        (b"\0" * 8, {"tokenizer": 7}, None, "must be a fingerprint"),
        (b"\1\0\0\0", {"token_bytes": [1]}, None, "token 0 has the id 1"),
        (b"\0" * 8, [1], None, "JSON object"),
        (b"\x0a\0\0\0" * 2, {}, None, "token 0 has the id 10"),
        (with_header(20240520, 1, np.zeros(8, "<u2"), 9), {}, None, "says 9 tokens"),
        (with_header(20240520, 1, np.zeros(8, "<u2")), {}, "uint32", "header says"),
    ],
)
def test_bad_token_files_are_refused(tmp_path, content, sidecar, token_dtype, message):
    path = tmp_path / "tokens.bin"
    path.write_bytes(content)
    if sidecar:
        (tmp_path / "tokens.bin.json").write_text(json.dumps(sidecar))
    with pytest.raises(ValueError, match=message):
        token_file.read_tokens(path, vocab_size=10, token_dtype=token_dtype)


def test_ids_are_checked_before_they_are_written(tmp_path):
    with pytest.raises(ValueError, match="token 2 has the id -1"):
        token_file.write_tokens(tmp_path / "t", np.array([0, 1, -1]), vocab_size=2)
    assert not list(tmp_path.iterdir())


# Synthetic


@pytest.mark.parametrize("vocab_size", [4, 50])
def test_markov_chain_has_the_stated_entropy(vocab_size):
    tokens = markov_chain.markov_chain(vocab_size, 200_000, seed=1)
    pairs = np.zeros((vocab_size, vocab_size))
    np.add.at(pairs, (tokens[:-1], tokens[1:]), 1 / (len(tokens) - 1))
    rows = pairs.sum(1, keepdims=True)
    seen = pairs > 0
    conditional = -(pairs * np.log(pairs / rows, where=seen, out=pairs * 0)).sum()
    assert conditional == pytest.approx(markov_chain.ENTROPY_RATE, abs=0.01)
    marginal = -(rows * np.log(rows)).sum()
    assert marginal == pytest.approx(math.log(vocab_size), abs=0.01)


def test_synthetic_corpus_is_a_function_of_the_seed():
    first, again, other = (load("synthetic", seed=seed) for seed in (3, 3, 4))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    np.testing.assert_array_equal(
        np.r_[first.train, first.val],
        markov_chain.markov_chain(256, corpus.SYNTHETIC_TOKENS, seed=3),
    )
    assert first.entropy_rate == markov_chain.ENTROPY_RATE
    assert first.bytes_per_token is None
    with pytest.raises(ValueError, match="at least 4, got 3"):
        load("synthetic", vocab_size=3)


@given(st.integers(0, 99), st.booleans())
def test_fingerprint_sees_every_token_and_the_split(at, move):
    tokens = np.arange(100, dtype=np.uint8)
    before = corpus.Corpus(tokens[:90], tokens[90:], "").fingerprint
    changed, cut = tokens.copy(), 90
    if move:
        cut = 89
    else:
        changed[at] += 1
    after = corpus.Corpus(changed[:cut], changed[cut:], "").fingerprint
    assert before != after


# Batches


def batches_of(length=103, batch_size=4, seq_len=5, seed=0, **kwargs):
    tokens = np.arange(length, dtype=np.uint16)
    return Batches(tokens, batch_size=batch_size, seq_len=seq_len, seed=seed, **kwargs)


@given(st.integers(0, 10**6), st.integers(0, 2**32 - 1))
def test_batch_is_a_pure_function_of_step_and_seed(step, seed):
    batch = batches_of(seed=seed)(step)
    batches = batches_of(seed=seed)
    batches(7)
    np.testing.assert_array_equal(batch, batches(step))
    assert batch.shape == (4, 6) and batch.dtype == np.int32
    # The tokens count up, so a window is consecutive and starts at a multiple of T.
    assert (np.diff(batch, axis=1) == 1).all() and (batch[:, 0] % 5 == 0).all()


@given(st.integers(2, 60), st.integers(1, 7), st.integers(1, 5), st.integers(0, 9))
def test_every_epoch_covers_every_window_once(length, batch_size, seq_len, seed):
    length = max(length, seq_len + 1)
    batches = batches_of(length, batch_size, seq_len, seed)
    windows = (length - 1) // seq_len
    assert batches.steps_per_epoch == math.ceil(windows / batch_size)
    steps = range(2 * batches.steps_per_epoch)
    starts = np.concatenate([batches(step)[:, 0] for step in steps])
    for epoch in range(2):
        seen = starts[epoch * windows : (epoch + 1) * windows]
        assert sorted(seen) == [i * seq_len for i in range(windows)]


@given(st.integers(0, 99), st.integers(1, 3))
def test_microbatches_are_one_large_batch_in_order(step, count):
    large = batches_of(batch_size=4 * count)
    folded = batches_of(microbatches=count)
    assert folded.steps_per_epoch == large.steps_per_epoch
    np.testing.assert_array_equal(folded(step), large(step).reshape(count, 4, 6))
    rows = np.array([1, 2])
    own = batches_of(microbatches=count, rows=rows)
    np.testing.assert_array_equal(own(step), folded(step)[:, rows])


def test_order_depends_on_seed_and_epoch():
    first, second = batches_of(2001, 20), batches_of(2001, 20, seed=1)
    assert (first(0) != second(0)).any()
    assert first.steps_per_epoch == 20
    assert (first(0) != first(20)).any() and (first(20) != second(0)).any()


def test_prefetch_resumes_where_a_run_stopped():
    straight = list(batches_of().prefetch(0, 12))
    resumed = list(batches_of().prefetch(5, 12))
    assert [step for step, _ in straight] == list(range(12))
    for (step, batch), (again, other) in zip(straight[5:], resumed, strict=True):
        assert step == again
        np.testing.assert_array_equal(batch, other)
        np.testing.assert_array_equal(batch, batches_of()(step))
    assert list(batches_of().prefetch(3, 3)) == []


def test_prefetch_gives_batches_of_one_sequence():
    batches = batches_of(batch_size=1)
    [(step, batch)] = batches.prefetch(3, 4)
    assert step == 3
    np.testing.assert_array_equal(batch, batches(3))


def test_prefetch_leaves_no_thread_behind():
    before = set(threading.enumerate())
    running = batches_of().prefetch(0, 1000)
    next(running)
    started = set(threading.enumerate()) - before
    assert started
    running.close()
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()


@given(
    st.integers(2, 200),
    st.integers(1, 9),
    st.integers(1, 5),
    st.none() | st.integers(1, 4),
)
def test_eval_batches_are_distinct_windows_in_order(length, size, seq_len, limit):
    length = max(length, seq_len + 1)
    tokens = np.arange(length, dtype=np.uint16)
    batches = eval_batches(tokens, batch_size=size, seq_len=seq_len, limit=limit)
    windows = (length - 1) // seq_len
    size = min(size, windows)
    assert len(batches) == min(windows // size, limit or windows)
    assert all(b.shape == (size, seq_len + 1) and b.dtype == np.int32 for b in batches)
    starts = np.concatenate([batch[:, 0] for batch in batches])
    assert (np.diff(starts) > 0).all() and (starts % seq_len == 0).all()
    assert starts[-1] + seq_len < length


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 5}, "6 tokens, but there are only 5"),
        ({"seq_len": 0}, "`seq_len` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"seed": -1}, "`seed` must be from 0"),
    ],
)
def test_impossible_batches_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        batches_of(**change)
