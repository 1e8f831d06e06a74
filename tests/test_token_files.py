"""Token files of other tools: each is read right, or refused by name."""

import gzip
import io
import json
import lzma
import pickle
import zipfile

import numpy as np
import pytest

from nanochat_jax import cli
from nanochat_jax.commands import command_of
from nanochat_jax.lm.checkpoints import Checkpoints
from nanochat_jax.lm.data import Batches, bpe, dataset_folder, eval_batches
from nanochat_jax.lm.data.corpus import FileOptions, load_corpus
from nanochat_jax.lm.data.joined import JoinedTokens
from nanochat_jax.lm.data.token_file import read_shards, read_tokens
from nanochat_jax.lm.data.tokenizer import ByteTokenizer
from nanochat_jax.lm.training import init_state, make_run, make_sampler, resume
from tiny import run_config

VOCAB = 50_257
FULL = 65_536  # with which any two bytes are an id


def ids_of(length=2000, vocab_size=VOCAB, seed=0):
    """Ids that are frequent if they are small, as those of text are."""
    drawn = np.random.default_rng(seed).zipf(1.2, 20 * length) - 1
    return drawn[drawn < vocab_size][:length]


IDS = ids_of()


def llm_c(magic, version, ids, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    return header.tobytes() + ids.tobytes()


def npy(ids):
    file = io.BytesIO()
    np.save(file, ids)
    return file.getvalue()


def megatron(ids, code, documents=(500, 700, 800)):
    """The index of Megatron, as its builder writes it."""
    lengths = np.array(documents, "<i4")
    starts = np.r_[0, np.cumsum(lengths)[:-1]].astype("<i8") * ids.itemsize
    head = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + bytes([code])
    counts = np.array([len(lengths), len(lengths) + 1], "<u8").tobytes()
    order = np.arange(len(lengths) + 1, dtype="<i8")
    return head + counts + b"".join(x.tobytes() for x in (lengths, starts, order))


def datatrove(ids, ends=(500, 1200, 2000)):
    return {
        "a.ds": ids.tobytes(),
        "a.ds.metadata": f"gpt2|{ids.itemsize}\n{len(ids)}\n2 KT".encode(),
        "a.ds.index": np.array(ends, "<u8").tobytes(),
    }


def litdata(ids, items=4):
    parts = [part.tobytes() for part in np.split(ids, items)]
    sizes = [4 + 4 * (items + 1), *map(len, parts)]
    table = np.r_[items, np.cumsum(sizes)].astype("<u4")
    return table.tobytes() + b"".join(parts)


def mds(ids, items=4, column="token"):
    facts = {"column_names": [column], "column_sizes": [None], "pad": ""}
    facts["pad"] = " " * (len(json.dumps(facts)) % 2)
    names = json.dumps(facts).encode()
    parts = [part.tobytes() for part in np.split(ids, items)]
    sizes = [4 + 4 * (items + 1) + len(names), *map(len, parts)]
    table = np.r_[items, np.cumsum(sizes)].astype("<u4")
    return table.tobytes() + names + b"".join(parts)


def safetensors(ids):
    ends = [0, ids.nbytes]
    head = json.dumps({"ids": {"dtype": "I64", "shape": [1], "data_offsets": ends}})
    return len(head).to_bytes(8, "little") + head.encode() + ids.tobytes()


def zipped(ids):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("ids", ids.tobytes())
    return file.getvalue()


def write(folder, files):
    """Writes files, and returns the path of the first."""
    files = files if isinstance(files, dict) else {"tokens.bin": files}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder / next(iter(files))


U2, U4, I4, I8 = (IDS.astype(dtype) for dtype in ("<u2", "<u4", "<i4", "<i8"))
SMALL = ids_of(vocab_size=32)

RIGHT = {
    "raw uint32, by default": (U4.tobytes(), {}),
    "raw uint16": (U2.tobytes(), {"token_dtype": "uint16"}),
    "raw int32": (I4.tobytes(), {"token_dtype": "int32"}),
    "raw int64": (I8.tobytes(), {"token_dtype": "int64"}),
    "OLMo's .npy": ({"part-0.npy": U2.tobytes()}, {"token_dtype": "uint16"}),
    "OLMo's .npy of 4 bytes": ({"part-0.npy": U4.tobytes()}, {}),
    "llm.c, first header": (llm_c(20240520, 1, U2), {}),
    "llm.c, second header": (llm_c(20240801, 7, U4), {}),
    "np.save of uint16": ({"a.npy": npy(U2)}, {}),
    "np.save of int32, by its first bytes": (npy(I4), {}),
    "np.save of int64": ({"a.npy": npy(I8)}, {"token_dtype": "int64"}),
    "np.save of uint64": ({"a.npy": npy(IDS.astype("<u8"))}, {}),
    "datatrove of 2 bytes": (datatrove(U2), {}),
    "datatrove of 4 bytes": (datatrove(U4), {"token_format": "datatrove"}),
    "datatrove without metadata": (
        {"a.ds": U2.tobytes(), "a.ds.index": datatrove(U2)["a.ds.index"]}, {},
    ),
    "Megatron, int32": ({"a.bin": I4.tobytes(), "a.idx": megatron(I4, 4)}, {}),
    "Megatron, uint16": (
        {"a.bin": U2.tobytes(), "a.idx": megatron(U2, 8)}, {"token_format": "megatron"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("vocab_size", [VOCAB, FULL])
@pytest.mark.parametrize("name", RIGHT)
def test_ids_are_read_right(tmp_path, name, vocab_size):
    files, said = RIGHT[name]
    file = read_tokens(write(tmp_path, files), vocab_size=vocab_size, **said)
    np.testing.assert_array_equal(file.tokens, IDS)
    assert isinstance(file.tokens, np.memmap)
    if name.startswith(("datatrove", "Megatron")):
        assert file.layout.documents == 3


@pytest.mark.parametrize("header", [b"", llm_c(20240520, 1, SMALL.astype("u1"))[:1024]])
def test_bytes_are_read_right(tmp_path, header):
    path = write(tmp_path, header + SMALL.astype("u1").tobytes())
    said = {} if header else {"token_dtype": "uint8"}
    file = read_tokens(path, vocab_size=32, **said)
    np.testing.assert_array_equal(file.tokens, SMALL)


TEXT = "".join(f'{{"text": "a line of {i} words"}}\n' for i in range(200)).encode()
NO_TOKENS = {
    "npz": (zipped(U2), "zip archive"),
    "gzip": (gzip.compress(U2.tobytes()), "packed with gzip"),
    "zstd": (b"\x28\xb5\x2f\xfd" + U2.tobytes(), "packed with zstd"),
    "xz": (lzma.compress(U2.tobytes()), "packed with xz"),
    "safetensors": (safetensors(I8), "safetensors"),
    "JSON lines": (TEXT, "text. Give text with `--dataset text`, JSON lines with"),
    "UTF-8": ("ein Wörterbuch 日本 🦊\n".encode() * 99, "is no token file, but text"),
    "Arrow stream": (b"\xff\xff\xff\xff\x78\0\0\0" + U2.tobytes(), "an Arrow stream"),
    "Arrow file": (b"ARROW1\0\0" + U2.tobytes(), "an Arrow file"),
    "Parquet": (b"PAR1" + U2.tobytes() + b"PAR1", "`--dataset parquet`"),
    "ArrayRecord": (
        b"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f" + bytes(120) + U2.tobytes(), "ArrayRecord",
    ),
    "MDS": (mds(U2), "a shard of MosaicML Streaming"),
    "litdata, int64": (litdata(I8), "a chunk of litdata"),
    "litdata, uint16": (litdata(U2), "a chunk of litdata"),
    "litdata, chunks under V bytes": (litdata(I8[:400]), "a chunk of litdata"),
    "litdata, by its index": (
        {"a.bin": U2.tobytes(), "index.json": b'{"chunks": [{"filename": "a.bin"}]}'},
        "a chunk of litdata",
    ),
    "MDS, by its index": (
        {"a.mds": U2.tobytes(), "index.json": b'{"shards": [{"basename": "a.mds"}]}'},
        "a shard of MosaicML Streaming",
    ),
    "Megatron's index": ({"a.idx": megatron(I4, 4)}, "Give the .bin beside it"),
    "Megatron's index, renamed": (megatron(I4, 4), "the index of a Megatron data set"),
    "datatrove's index": (
        {"a.ds.index": datatrove(U2)["a.ds.index"]}, "Give the .ds beside it",
    ),
    "datatrove's metadata": (
        {"a.ds.metadata": datatrove(U2)["a.ds.metadata"]}, "metadata of a datatrove",
    ),
    "llm.c, an evaluation": (
        llm_c(20240522, 1, U2), "magic number 20240522 and version 1. Token files have",
    ),
    "llm.c, an unknown version": (llm_c(20240520, 2, U2), "20240520 and version 2"),
    "llm.c, another date": (llm_c(20250612, 7, U4), "20250612 and version 7"),
    "a pickle": (pickle.dumps(U2), "a pickle, such as an old .pt"),
    "big-endian .npy": (npy(U2.astype(">u2")), "is big-endian, >u2"),
    "floats": (npy(U2.astype("f4")), "ids must be integers"),
    "rows": (npy(U2.reshape(20, 100)), "has the shape (20, 100)"),
}  # fmt: skip


@pytest.mark.parametrize("vocab_size", [VOCAB, FULL])
@pytest.mark.parametrize("token_dtype", [None, "uint16"])
@pytest.mark.parametrize("name", NO_TOKENS)
def test_files_without_plain_ids_are_refused_by_name(
    tmp_path, name, token_dtype, vocab_size
):
    files, message = NO_TOKENS[name]
    path = write(tmp_path, files)
    with pytest.raises(ValueError, match=r"(a|tokens)\.") as error:
        read_tokens(path, vocab_size=vocab_size, token_dtype=token_dtype)
    assert message in str(error.value)


WRONG = {
    "int64 by default": (I8, None, VOCAB, 'set `token_dtype` to "int64"'),
    "int64 as uint16": (I8, "uint16", VOCAB, 'set `token_dtype` to "int64"'),
    "int64 as int32": (I8, "int32", FULL, 'set `token_dtype` to "int64"'),
    "uint32 as uint16": (U4, "uint16", VOCAB, 'set `token_dtype` to "uint32"'),
    "uint32 as uint16, all ids": (U4, "uint16", FULL, 'set `token_dtype` to "uint32"'),
    "large ids as uint16": (
        ids_of(vocab_size=128_256).astype("<u4"), "uint16", 128_256,
        'set `token_dtype` to "uint32"',
    ),
    "uint16 by default": (U2, None, VOCAB, 'set `token_dtype` to "uint16"'),
    "uint16 as int64": (U2, "int64", VOCAB, 'set `token_dtype` to "uint16"'),
    "uint16 as uint8": (U2, "uint8", VOCAB, "uint8 holds ids below 256"),
    "bytes in 16 bits, as uint8": (SMALL.astype("<u2"), "uint8", 256, '"uint16"'),
    "big-endian 16 bits": (U2.astype(">u2"), "uint16", FULL, "look big-endian"),
    "big-endian 16 bits by default": (
        U2.astype(">u2"), None, VOCAB, "Read as big-endian uint16 all are in the",
    ),
    "big-endian 32 bits": (U4.astype(">u4"), None, VOCAB, "as big-endian uint32 all"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_ids_of_another_width_are_refused_with_the_right_one(tmp_path, name):
    ids, said, vocab_size, message = WRONG[name]
    path = write(tmp_path, ids.tobytes())
    with pytest.raises(ValueError, match=r"tokens\.bin: ") as error:
        read_tokens(path, vocab_size=vocab_size, token_dtype=said)
    assert message in str(error.value)


@pytest.mark.parametrize("content", [np.full(999, VOCAB, "<u4"), np.r_[U4, U4 + VOCAB]])
def test_no_width_is_named_that_does_not_fit_either(tmp_path, content):
    """32-bit ids above the vocabulary are pairs of ids in it as 16 bits."""
    path = write(tmp_path, content.astype("<u4").tobytes())
    with pytest.raises(ValueError, match="Set `vocab_size`") as error:
        read_tokens(path, vocab_size=VOCAB)
    assert "token_dtype" not in str(error.value)
    file = datatrove(content.astype("<u4"), [len(content)])
    with pytest.raises(
        ValueError, match=r"Set `vocab_size` to that of the tokenizer\."
    ):
        read_tokens(write(tmp_path, file), vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (TEXT + b"\n" * (len(TEXT) % 2), {"token_dtype": "uint16"}),
        (I8.tobytes(), {"token_dtype": "uint32"}),
        (llm_c(20240522, 1, U2), {"token_dtype": "uint16"}),
    ],
)
def test_what_is_said_by_hand_is_done(tmp_path, files, said):
    path = write(tmp_path, files)
    with pytest.raises(ValueError, match=r"tokens\.bin"):
        read_tokens(path, vocab_size=FULL, **said)
    file = read_tokens(path, vocab_size=FULL, token_format="raw", **said)
    assert file.tokens.nbytes == path.stat().st_size


@pytest.mark.parametrize(
    ("files", "said", "message"),
    [
        (U4.tobytes(), {"token_format": "llm.c"}, "has no header of llm.c"),
        (U4.tobytes(), {"token_format": "npy"}, "no header of NumPy"),
        (U4.tobytes(), {"token_format": "megatron"}, "with its .idx beside it"),
        (U4.tobytes(), {"token_format": "datatrove"}, "must be a .ds with its"),
        (npy(U2), {"token_dtype": "uint32"}, "its header says 'uint16'"),
        (npy(U2)[:-4], {}, "its header says 2000 tokens, it has 1998"),
        (
            {"a.bin": I4.tobytes(), "a.idx": megatron(I4, 4)},
            {"token_dtype": "uint16"},
            "a.idx says 'int32', `token_dtype` says 'uint16'",
        ),
        (
            {"a.bin": I4.tobytes()[:-8], "a.idx": megatron(I4, 4)},
            {},
            "a.idx says 2000 tokens, it has 1998",
        ),
        ({"a.bin": I4.tobytes(), "a.idx": megatron(I4, 4)[:-8]}, {}, "its header says"),
        ({"a.bin": I4.tobytes(), "a.idx": megatron(I4, 7)}, {}, "are no integers"),
        (datatrove(U4), {"token_dtype": "uint16"}, "a.ds.metadata says 'uint32'"),
        (datatrove(U2, [1, 1999]), {}, "says 1999 tokens, it has 2000"),
        (datatrove(U2) | {"a.ds.metadata": b"gpt2\n"}, {}, "must end in |1, |2 or |4"),
        (datatrove(U2) | {"a.ds.index": b"\1"}, {}, "is empty or cut short"),
        (llm_c(20240520, 1, U2, 999), {}, "its header says 999 tokens"),
    ],
)
def test_claims_that_do_not_hold_are_refused(tmp_path, files, said, message):
    with pytest.raises(ValueError, match=r"(a|tokens)\.") as error:
        read_tokens(write(tmp_path, files), vocab_size=VOCAB, **said)
    assert message in str(error.value)


# Several files


def divided(folder, ids, cuts, suffix=".bin", make=lambda ids: ids.tobytes()):
    folder.mkdir(exist_ok=True)
    for index, part in enumerate(np.split(ids, cuts)):
        (folder / f"part_{index}{suffix}").write_bytes(make(part))
    return folder


def load(*paths, vocab_size=VOCAB, tokenizer=None, **said):
    return load_corpus(
        "tokens",
        paths,
        tokenizer=tokenizer or ByteTokenizer(),
        vocab_size=vocab_size,
        seq_len=16,
        files=FileOptions(**said),
    )


CUTS = [[700], [3, 5, 1990], list(range(150, 2000, 150))]


@pytest.mark.parametrize("cuts", CUTS)
def test_many_files_are_one(tmp_path, cuts):
    one = load(write(tmp_path, U4.tobytes()))
    many = load(divided(tmp_path / "shards", U4, cuts))
    assert many.fingerprint == one.fingerprint
    for split in ("train", "val"):
        whole, parts = getattr(one, split), getattr(many, split)
        np.testing.assert_array_equal(np.asarray(parts), whole)
        assert isinstance(parts, JoinedTokens) and len(parts) == len(whole)
    said = {"batch_size": 4, "seq_len": 16}
    batches, same = (Batches(c.train, seed=1, **said) for c in (many, one))
    for step in (0, 7, 40):
        np.testing.assert_array_equal(batches(step), same(step))
    both = (eval_batches(c.val, **said) for c in (many, one))
    np.testing.assert_array_equal(*both)
    assert f"{len(cuts) + 1} files" in many.description


def test_files_of_a_folder_or_a_pattern_go_by_number(tmp_path):
    folder = divided(tmp_path / "shards", U4, CUTS[2])
    for name in ("README.md", "tokenizer.json", "notes.txt", ".hidden.bin"):
        (folder / name).write_bytes(b"no ids")
    (folder / "part_3.bin.json").write_text('{"tokens": 150}')
    names = [f"part_{i}.bin" for i in range(14)]
    for path in (folder, folder / "*.bin", tmp_path / "**" / "part*"):
        file, found = read_shards([path], vocab_size=VOCAB)
        assert [p.name for p in found] == names
        np.testing.assert_array_equal(np.asarray(file.tokens), IDS)
    last, first = folder / names[-1], folder / names[0]
    found = read_shards([last, first, folder], vocab_size=VOCAB)[1]
    assert [p.name for p in found] == [names[-1], *names[:-1]]


def test_shards_of_megatron_and_datatrove_take_their_neighbours_along(tmp_path):
    folder = divided(tmp_path / "a", I4, [1000])
    for index in range(2):
        (folder / f"part_{index}.idx").write_bytes(megatron(I4, 4, [400, 600]))
    corpus = load(folder / "*")
    np.testing.assert_array_equal(np.r_[corpus.train, corpus.val], IDS)
    assert corpus.description.endswith("2 files, 4 documents")
    folder = divided(tmp_path / "b", U2, [1000], ".ds")
    for index in range(2):
        (folder / f"part_{index}.ds.metadata").write_text("gpt2|2")
    corpus = load(folder)
    np.testing.assert_array_equal(np.r_[corpus.train, corpus.val], IDS)


def test_a_pattern_of_indices_alone_is_refused_by_name(tmp_path):
    write(tmp_path, {"a.idx": megatron(I4, 4)})
    with pytest.raises(ValueError, match=r"Give the \.bin beside it"):
        load(tmp_path / "*.idx")


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    folder = divided(tmp_path / "a", U4, [700])
    (folder / "part_2.npy").write_bytes(npy(U4))
    with pytest.raises(ValueError, match=r"raw of uint32 in .*npy of uint32 in .*npy"):
        load(folder)
    (folder / "part_2.npy").unlink()
    for index in range(2):
        sidecar = folder / f"part_{index}.bin.json"
        sidecar.write_text(json.dumps({"tokenizer": str(index)}))
    with pytest.raises(ValueError, match=r"of one tokenizer, got \['0', '1'\]"):
        load(folder)
    sidecar.write_text("{}")
    assert load(folder).tokenizer is None


def test_all_bad_files_are_named(tmp_path):
    folder = divided(tmp_path / "a", U2, CUTS[1])
    with pytest.raises(ValueError, match="ids go from") as error:
        load(folder)
    for index in (2, 3):
        assert f"part_{index}.bin: " in str(error.value)


def test_paths_without_token_files_are_all_named(tmp_path):
    (tmp_path / "notes.txt").write_text("none")
    paths = (tmp_path, tmp_path / "x.bin", tmp_path / "*.npy")
    with pytest.raises(ValueError, match="no files") as error:
        load(*paths)
    lines = str(error.value).split("\n")
    assert "no files *.bin, *.npy, *.ds in this folder" in lines[0]
    assert "no such file" in lines[1] and "no file matches" in lines[2]


# The tokenizer of ids that do not name it


TINY = {"n_layers": 1, "vocab_size": 300, "dataset": "tokens", "max_seq_len": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ids and their tokenizer, and a checkpoint of a run on the ids alone."""
    folder = tmp_path_factory.mktemp("unknown")
    dataset_folder.build_dataset(folder / "data", ["the cat sat on the mat"] * 40, 280)
    (folder / "data" / "tokens.bin.json").unlink()
    large = bpe.train([f"{i} {i}" for i in range(900)], 400)
    (folder / "large.json").write_text(large, encoding="utf-8")
    run = make_run(run_config(**TINY, data_path=[str(folder / "data" / "tokens.bin")]))
    with Checkpoints(folder / "run") as checkpoints:
        checkpoints.save(1, init_state(run), run.meta)
    return folder


def test_ids_of_an_unknown_tokenizer_are_not_called_bytes(folder):
    assert Checkpoints(folder / "run").read_meta()["tokenizer"] is None
    said = TINY | {"data_path": [str(folder / "data" / "tokens.bin")]}
    run = make_run(run_config(**said))
    assert make_sampler(run) is None
    said["tokenizer"] = str(folder / "data" / "tokenizer.json")
    known = make_run(run_config(**said))
    assert known.meta["tokenizer"] == known.tokenizer.fingerprint
    assert known.corpus.fingerprint == run.corpus.fingerprint
    said["tokenizer"] = str(folder / "large.json")
    with pytest.raises(ValueError, match=r"has 362 ids, but the model's .* only 300"):
        make_run(run_config(**said))


def test_generate_asks_for_an_unknown_tokenizer_and_takes_any(folder, capsys):
    command = ["generate", "--checkpoint", str(folder / "run"), "--max-tokens", "3"]
    with pytest.raises(SystemExit) as error:
        cli.main(command)
    assert error.value.code == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert "ids of an unknown tokenizer. Give its file by `--tokenizer`" in told.err
    tokenizer = str(folder / "data" / "tokenizer.json")
    assert cli.main([*command, "--tokenizer", tokenizer, "--prompt", "the"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("the")
    assert "note: the model was trained on ids of an unknown tokenizer" in told.err
    with pytest.raises(SystemExit):
        cli.main([*command, "--tokenizer", str(folder / "large.json")])
    assert "the tokenizer has 362 ids" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_on_unknown_ids_goes_on(folder, tmp_path):
    run = make_run(run_config(**TINY, data_path=[str(folder / "data" / "tokens.bin")]))
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, init_state(run), run.meta | {"tokenizer": "bytes"})
    resume.restore(run, Checkpoints(tmp_path / "run"))


def test_every_data_path_counts():
    flags = ["--data-path", "a", "b", "--lr", "1", "--data-path", "c", "--data_path=d"]
    for args in (["train", *flags], ["train", "--data-path", "a", "b", "c", "d"]):
        assert command_of(args).data_path == ("a", "b", "c", "d")


def test_of_several_files_only_the_last_may_say_what_is_held_out(tmp_path):
    paths = [tmp_path / name for name in ("a.bin", "b.bin")]
    for path in paths:
        path.write_bytes(U4.tobytes())
        path.with_name(f"{path.name}.json").write_text('{"held_out": 5}')
    read = lambda: read_shards(paths, vocab_size=VOCAB)[0]
    with pytest.raises(ValueError, match=r"`held_out`.* of .*a\.bin"):
        read()
    paths[0].with_name("a.bin.json").unlink()
    assert read().held_out == 5
