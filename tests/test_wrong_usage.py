"""Each wrong use of the command line gets one message that says what is right."""

import io
import sys

import pytest

from nanochat_jax import cli
from nanochat_jax.commands import command_of
from nanochat_jax.commands.usage import ending, parsing, registry
from nanochat_jax.commands.usage.words import value_of

WRONG = {
    "trian": "unknown command `trian`. Did you mean `nanochat-jax train`?",
    "sample": "unknown command `sample`. Did you mean `nanochat-jax generate`?",
    "help": "unknown command `help`. Did you mean `nanochat-jax --help`?",
    "zzz --help": "unknown command `zzz`. Commands: train, plan, compare, plot, ",
    "": "a command is required: train, plan, ",
    "--lr 1 plan": "the command comes first: nanochat-jax plan --lr ...",
    "-v": "a command is required before `-v`: train, ",
    "plan help": "unexpected `help`. Did you mean `--help`?",
    "prepare-data a": "unexpected `a`. Did you mean `--text a`?",
    "plan --learning-rate 3": "unknown flag `--learning-rate`. Did you mean `--lr`?",
    "plan -lr 3": "unknown flag `-lr`. Did you mean `--lr`?",
    "plan --use-8bit": "unknown flag `--use-8bit`. Did you mean `--use-8bit-optim`?",
    "plan --no-galore": "unknown flag `--no-galore`. Did you mean `--no-use-galore`?",
    "plan --no-lr": "unknown flag `--no-lr`. Did you mean `--lr`?",
    "plan --max-steps 3": "unknown flag `--max-steps`. Did you mean `--total-steps`?",
    "plan --bar": "unknown flag `--bar`.",
    "plan --lr": "`--lr` needs a value, got none.",
    "plan --lr x": "`--lr` must be a number, got 'x'.",
    "plan --lr nan": "`--lr` must be finite, got nan.",
    "plan --dim 2.5": "`--dim` must be a whole number, got '2.5'.",
    "plan --adam-betas 0.9": "`--adam-betas` needs 2 values, got 1.",
    "plan --quant-bits 3": "`--quant-bits` must be one of 8, 4, got '3'.",
    "plan --dataset txt": "got 'txt'. Did you mean `text`?",
    "plan --use-galore=no": "Write `--use-galore` or `--no-use-galore` alone.",
    "plan --no-use-galore true": "unexpected `true`. Switches take no value: ",
    "plan --mesh 4": "`key=number,key=number`, such as `data=2,fsdp=4`, got '4'",
    "plan a.toml": "unexpected `a.toml`. Did you mean `--config-file a.toml`?",
    "plan lr=3": "unexpected `lr=3`. Did you mean `--lr 3`?",
    "plan --lr -1": "`lr` must be at least 0, got -1.0.",
    "plan --no-compile --memory-limit 3GB": "Leave out `--no-compile`.",
    "generate": "`--checkpoint` is required: Checkpoint folder of a run, or the folder",
    "generate a": "unexpected `a`. Did you mean `--checkpoint a`?",
    "generate --prompt -a": "A value that begins with a dash is written `--prompt=-a`.",
    "generate --checkpoint a --seed -1": "`--seed` must be from 0 to 2**32 - 1, got -1",
}
BEGUN = (
    "plan --no-compile --memory-limit 3GB", "generate --checkpoint a --seed -1",
)  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


def refused(words, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(SystemExit) as error:
        cli.main(words.split())
    assert error.value.code == ending.BAD_USAGE == 2
    return stream.getvalue()


@pytest.mark.parametrize("words", WRONG)
@pytest.mark.parametrize("columns", [80, 140, None])
def test_a_wrong_use_is_told_what_is_right(words, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns or 80))
    said = refused(words, monkeypatch, Terminal() if columns else io.StringIO())
    assert said.startswith("error: ")
    assert "\x1b" not in said
    lines = said.splitlines()
    if columns:
        assert max(map(len, lines)) <= columns
    else:
        assert WRONG[words] in said
    assert " ".join(WRONG[words].split()) in " ".join(said.split())
    name = words.partition(" ")[0]
    known = f"Flags: nanochat-jax {name} --help"
    expected = known if name in registry.COMMANDS else "Help: nanochat-jax --help"
    # A command that has begun to run knows its flags, and has no need of the hint.
    assert lines[-1].strip() == expected or words in BEGUN


def test_all_that_is_wrong_is_in_one_message(tmp_path, monkeypatch):
    file = tmp_path / "run.toml"
    file.write_text("learning_rate = 1\nns_steps = 0\ndim = 'a'\nwarmup_steps = -1\n")
    words = f"plan --config-file {file} --foo 1 --lr x --galore-rank 0 --seed"
    assert refused(words, monkeypatch, io.StringIO()).splitlines() == [
        "error: `--seed` needs a value, got none.",
        "  unknown flag `--foo`.",
        "  `--lr` must be a number, got 'x'.",
        f"  {file}: unknown key `learning_rate`. Did you mean `lr`?",
        f"  {file}: `dim` must be of type int, got 'a' (str).",
        f"  {file}: `warmup_steps` must be at least 0, got -1.",
        f"  {file}: `ns_steps` must be at least 1, got 0.",
        "  `galore_rank` must be at least 1, got 0.",
        "  Flags: nanochat-jax plan --help",
    ]


def test_words_become_values_as_in_a_file():
    words = (
        "--mesh data=2 fsdp=4 --galore_rank 0.25 --no-remat --lr=1e-3 --use-galore "
        "--adam-betas 0.8 0.9 --data-path a b --data-path=c --seed 1 --seed 2 "
        "--hardware none --sample-prompt=-x --projector-bits 8 --batch-size 8"
    )
    plan = command_of(["plan", *words.split()])
    expected = {
        "mesh": {"data": 2, "fsdp": 4}, "galore_rank": 0.25, "remat": False, "lr": 1e-3,
        "use_galore": True, "adam_betas": (0.8, 0.9), "data_path": ("a", "b", "c"),
        "seed": 2, "hardware": None, "sample_prompt": "-x", "projector_bits": 8,
    }  # fmt: skip
    assert {key: getattr(plan, key) for key in expected} == expected
    assert value_of(["-0.5"], float) == -0.5  # a number with a dash is no flag
    assert parsing.parse(type(plan), ["--lr", "-0.5"]).values == {"lr": -0.5}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "/a/b"), "/a/b: No space left"),
        (PermissionError(13, "Permission denied", "/a"), "/a: Permission denied"),
        (OSError("odd"), "odd"),
        (FloatingPointError("10 steps in a row"), "10 steps in a row"),
    ],
)
def test_a_fault_of_the_system_is_a_line_with_its_path(
    error, said, monkeypatch, capsys
):
    def run(self):
        raise error

    monkeypatch.setattr("nanochat_jax.commands.doctor.Doctor.run", run)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_a_folder_that_cannot_be_written_is_found_first(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    words = f"prepare-data --dataset stdlib --vocab-size 300 --output {tmp_path}/file/a"
    said = refused(words, monkeypatch, io.StringIO())
    assert "cannot be written" in said and f"{tmp_path}/file" in said
