"""Records in JSON lines and Parquet: documents, and conversations of an assistant."""

import json

import numpy as np
import pytest
import tokenizers

from nanochat_jax.lm.data import Batches, documents
from nanochat_jax.lm.data.corpus import FileOptions, load_corpus
from nanochat_jax.lm.data.records import chat
from nanochat_jax.lm.data.records.packages import load_packages
from nanochat_jax.lm.data.tokenizer import ByteTokenizer, load_tokenizer

TEXTS = [f"Document {i} is about the cat {i % 7} 🦊.\n" * 3 for i in range(60)]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]


def make_tokenizer(folder, end_token):
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([*TEXTS, "user assistant system think"] * 2, trainer)
    path = folder / "tokenizer.json"
    model.save(str(path))
    return load_tokenizer(path, end_token)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), "<|im_end|>")


def write_lines(path, records):
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def load(name, *paths, tokenizer=None, seq_len=8, **options):
    return load_corpus(
        name,
        paths,
        tokenizer=tokenizer or ByteTokenizer(),
        vocab_size=512,
        seq_len=seq_len,
        files=FileOptions(**options),
    )


def as_text_files(folder, texts):
    folder.mkdir()
    for index, text in enumerate(texts):
        (folder / f"{index:03}.txt").write_text(text, encoding="utf-8")
    return folder


# Documents


def test_json_lines_are_the_same_corpus_as_text_files(tmp_path, tokenizer):
    records = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    path = write_lines(tmp_path / "all.jsonl", records)
    for given in (None, tokenizer):
        lines = load("jsonl", path, tokenizer=given)
        files = load("text", as_text_files(tmp_path / f"{given}"[:9], TEXTS),
                     tokenizer=given)  # fmt: skip
        assert lines.fingerprint == files.fingerprint
        assert lines.bytes_per_token == files.bytes_per_token
        assert lines.tokenizer == files.tokenizer
        assert lines.train.dtype == files.train.dtype


def test_records_may_lie_in_many_files_of_a_folder_or_a_pattern(tmp_path):
    whole = load("jsonl", write_lines(tmp_path / "all", [{"text": t} for t in TEXTS]))
    folder = tmp_path / "shards"
    folder.mkdir()
    for index, part in enumerate(np.array_split(TEXTS, 12)):
        write_lines(folder / f"part-{index}.jsonl", [{"text": t} for t in part])
    (folder / "dataset_info.json").write_text("{}")
    for path in (folder, folder / "part-*.jsonl"):
        found = load("jsonl", path)
        assert found.fingerprint == whole.fingerprint
        assert found.description == f"{path}, 12 files, 60 records"


def test_whole_documents_are_held_out_however_few(tmp_path):
    for count in (2, 19, 60):
        records = [{"body": text} for text in (*TEXTS[:count], "", TEXTS[0])]
        path = write_lines(tmp_path / "few.jsonl", records)
        corpus = load("jsonl", path, text_field="body")
        kept, held = (
            bytes(ids).decode().split("\0")[:-1] for ids in (corpus.train, corpus.val)
        )
        assert sorted(kept + held) == sorted([*TEXTS[:count], TEXTS[0]])
        assert not set(kept) & set(held)
        assert len(set(held)) == max(1, round(count * documents.HELD_OUT))


BAD_LINES = [
    '{"text": "fine"}',
    "",
    '{"text": ',
    '["text"]',
    '{"body": "no"}',
    '{"text": 7}',
    '{"text": null}',
    '{"text": ["a list"]}',
]


def test_bad_lines_are_all_named_by_file_and_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(BAD_LINES))
    with pytest.raises(ValueError, match="bad") as error:
        load("jsonl", path)
    lines = str(error.value).split("\n")
    assert [line.split(": ")[0] for line in lines] == [
        f"{path}:{number}" for number in (3, 4, 5, 6, 7, 8)
    ]
    assert "no JSON at column " in lines[0] and "no JSON object" in lines[1]
    assert "no field `text`, only ['body']. Set `text_field`" in lines[2]
    assert "must be a text, as the records before are, got 7." in lines[3]
    path.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match=":1: not UTF-8"):
        load("jsonl", path)
    path.write_text('{"text": "\\ud800"}\n{"text": ' + "9" * 5000 + "}\n")
    with pytest.raises(ValueError, match=r"(?s):1: .*surrogates.*:2: cannot be read"):
        load("jsonl", path)
    path.write_text('{"body": 1}\n' * 30)
    with pytest.raises(ValueError, match="Records after these were not") as error:
        load("jsonl", path)
    assert str(error.value).count("no field") == 10


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("jsonl", b"PAR1" + bytes(40), "no text, but a Parquet file"),
        ("jsonl", b"\x1f\x8b\x08" + bytes(40), "packed with gzip. Unpack it first"),
        ("jsonl", b"\n", "the training split has 0 tokens"),
    ],
)
def test_files_of_other_formats_are_refused(tmp_path, name, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(name, path)


def test_a_package_that_is_missing_is_named_with_its_extra():
    with pytest.raises(ValueError, match=r"no_such_package.*nanochat-jax\[parquet\]"):
        load_packages("json", "no_such_package", extra="parquet")


def test_parquet_is_the_same_corpus_as_json_lines(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    from pyarrow import parquet

    lines = write_lines(tmp_path / "all.jsonl", [{"text": text} for text in TEXTS])
    table = arrow.table({"id": range(60), "text": TEXTS})
    for index, part in enumerate((table[:33], table[33:])):
        parquet.write_table(part, tmp_path / f"{index}.parquet", row_group_size=10)
    found = load("parquet", tmp_path)
    assert found.fingerprint == load("jsonl", lines).fingerprint
    with pytest.raises(ValueError, match="no field `body`, only"):
        load("parquet", tmp_path, text_field="body")
    with pytest.raises(ValueError, match=r"all\.jsonl: cannot be read as Parquet"):
        load("parquet", lines)
    parquet.write_table(arrow.table({"text": ["a", None]}), tmp_path / "null.parquet")
    with pytest.raises(ValueError, match=r"null\.parquet: row 2: must be a text"):
        load("parquet", tmp_path / "null.parquet")


# Conversations


def chatml(messages, ask):
    turns = (f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return "".join(turns) + "<|im_start|>assistant\n" * ask


def thinking(messages, ask):
    """A template that shows thoughts of the last turn only, and empty ones too."""
    queries = [i for i, m in enumerate(messages) if m["role"] == "user"]
    shown = []
    for index, message in enumerate(messages):
        thought, _, answer = message["content"].rpartition("</think>")
        if message["role"] == "assistant":
            thought = thought.removeprefix("<think>").strip()
            head = f"<think>\n{thought}\n</think>\n\n" if index > queries[-1] else ""
            message = message | {"content": head + answer.strip()}
        shown.append(message)
    return chatml(shown, ask)


def brackets(messages, ask):
    """A template that trims texts and ends turns of the assistant only."""
    turns = (
        f" {m['content'].strip()} </s>"
        if m["role"] == "assistant"
        else f"<s>[INST] {m['content'].strip()} [/INST]"
        for m in messages
    )
    return "".join(turns)


def talk(*contents):
    roles = ("user", "assistant")
    return [
        {"role": roles[i % 2], "content": content} for i, content in enumerate(contents)
    ]


def predicted(tokenizer, ids):
    """Texts of the stretches of ids that are predicted."""
    ids = np.r_[-1, ids, -1]
    cuts = np.flatnonzero(np.diff(ids >= 0)) + 1
    return [tokenizer.decode(part) for part in np.split(ids, cuts)[1::2]]


FOX = "the 🦊 cat\nsat"


@pytest.mark.parametrize(
    ("render", "messages", "learned"),
    [
        (chatml, talk("hi", FOX), [f"{FOX}<|im_end|>"]),
        (
            chatml,
            [{"role": "system", "content": "Be a cat"}, *talk("a", "b b", "b b", "c")],
            ["b b<|im_end|>", "c<|im_end|>"],
        ),
        (
            thinking,
            talk("a", "<think>hm</think>b", "a", "<think>so\n</think>\n\nthink"),
            ["b<|im_end|>", "<think>\nso\n</think>\n\nthink<|im_end|>"],
        ),
        (thinking, talk("a", "think"), ["<think>\n\n</think>\n\nthink<|im_end|>"]),
        (brackets, talk("a", " b ", "b", "c"), [" b </s>", " c </s>"]),
    ],
)
def test_only_the_turns_of_the_assistant_are_predicted(
    tokenizer, render, messages, learned
):
    ids = chat.Chat(tokenizer, render).encode(messages)
    assert ids.dtype == np.int32
    assert predicted(tokenizer, ids) == learned
    text = tokenizer.decode(np.where(ids < 0, ~ids, ids))
    assert text.removeprefix(render(messages, False)) in ("", "<|im_end|>")


def test_a_conversation_ends_in_one_end_token(tokenizer, tmp_path):
    end = tokenizer.separator
    ids = chat.Chat(tokenizer, chatml).encode(talk("a", "b"))
    assert (ids == end).sum() == 1 and (ids == ~end).sum() == 1  # of both turns
    ids = chat.Chat(tokenizer, brackets).encode(talk("a", "b"))
    assert ids[-1] == ~end and tokenizer.decode(ids[-2:-1]) == "</s>"
    other = make_tokenizer(tmp_path, "</s>")
    ids = chat.Chat(other, brackets).encode(talk("a", "b"))
    assert ids[-1] == other.separator and (np.maximum(ids, ~ids) == ids[-1]).sum() == 1


def test_special_tokens_of_the_template_are_single_ids(tokenizer):
    ids = chat.Chat(tokenizer, chatml).encode(talk("a", "b"))
    assert tokenizer.decode(~ids[:1]) == "<|im_start|>"
    # Elsewhere they are text like any other.
    assert len(tokenizer.encode("<|im_start|>")) > 1


@pytest.fixture
def with_chatml(monkeypatch):
    monkeypatch.setattr(chat, "_template_of", lambda path: chatml)


def test_a_corpus_of_conversations_has_complements(tmp_path, tokenizer, with_chatml):
    talks = [talk(f"question {i}", f"an answer of {i}") for i in range(40)]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": m} for m in talks])
    corpus = load("jsonl", path, tokenizer=tokenizer, text_field="messages")
    assert corpus.train.dtype == np.int32
    one_by_one = [chat.Chat(tokenizer, chatml).encode(m) for m in talks]
    held = [ids for ids in one_by_one if ids.tobytes() in corpus.val.tobytes()]
    assert len(held) == 2 and len(np.concatenate(held)) == len(corpus.val)
    assert len(corpus.train) + len(corpus.val) == sum(map(len, one_by_one))
    answers = predicted(tokenizer, corpus.val)
    size = sum(len(a.removesuffix("<|im_end|>").encode()) + 1 for a in answers)
    assert corpus.bytes_per_token == pytest.approx(size / (corpus.val >= 0).sum())
    batch = Batches(corpus.train, batch_size=2, seq_len=16, seed=0)(0)
    assert batch.dtype == np.int32 and (batch < 0).any() and (batch >= 0).any()
    assert np.where(batch < 0, ~batch, batch).max() < tokenizer.vocab_size


def test_what_is_no_conversation_is_named_by_line(tmp_path, tokenizer, with_chatml):
    records = [
        talk("a", "b"),
        [],
        talk("only a question"),
        talk("a", ""),
        [{"role": "user"}, "text", *talk("a", "b")],
        [{"role": "user", "content": None}, *talk("a", "b")],
        "text",
    ]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": m} for m in records])
    with pytest.raises(ValueError, match="messages") as error:
        load("jsonl", path, tokenizer=tokenizer, text_field="messages")
    lines = str(error.value).split("\n")
    assert [line.split(": ")[0] for line in lines] == [
        f"{path}:{number}" for number in range(2, 8)
    ]
    assert "has no messages" in lines[0]
    assert "no message of the role assistant" in lines[1]
    assert "which these have not: 2." in lines[2]
    assert "which these have not: 1, 2." in lines[3]
    assert "which these have not: 1." in lines[4]
    assert "must be a list of messages, as the records before are" in lines[5]


def refusing(messages, ask):
    raise RuntimeError("roles must alternate")


@pytest.mark.parametrize(
    ("render", "message"),
    [
        (refusing, "the chat template refuses it: roles must alternate"),
        (lambda m, ask: "fixed", "message 2: the chat template does not render"),
        (lambda m, ask: chatml(m, ask).upper(), "message 2: the chat template does"),
        (lambda m, ask: f"{len(m)}{chatml(m, ask)}", "message 2: the chat template"),
    ],
)
def test_templates_whose_turns_cannot_be_told_are_refused(tokenizer, render, message):
    with pytest.raises(ValueError, match=message):
        chat.Chat(tokenizer, render).encode(talk("what", "no"))


def test_bytes_have_no_chat_template(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": talk("a", "b")}] * 30)
    with pytest.raises(ValueError, match="take a tokenizer with a chat temp") as error:
        load("jsonl", path, text_field="messages")
    assert str(error.value).count("\n") == 0


TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_ids_and_turns_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip(
        "transformers", reason="the extra chat is not installed"
    )
    pytest.importorskip("jinja2", reason="the extra chat is not installed")
    tokenizer = make_tokenizer(tmp_path, "</s>")
    with pytest.raises(ValueError, match="has no chat template"):
        chat.Chat(tokenizer)
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(facts))
    messages = talk("hi 🦊", FOX, "and <|im_start|>?", "a cat")
    ids = chat.Chat(tokenizer).encode(messages)
    wanted = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert np.where(ids < 0, ~ids, ids).tolist() == [
        *wanted["input_ids"],
        tokenizer.separator,
    ]
    assert (ids >= 0).tolist() == [*map(bool, wanted["assistant_masks"]), False]
