"""What the documentation says is so: docstring examples, and the README's blocks."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import re
import shlex
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import nanochat_jax as nj
from nanochat_jax import cli
from nanochat_jax.config import Config, ModelConfig
from nanochat_jax.lm import huggingface
from nanochat_jax.lm.model import gpt

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
OPERATORS = {"&&", "||", "|", ";", ">", ">>", "&"}


def docstring_examples():
    for path in sorted((ROOT / "nanochat_jax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        for node in ast.walk(ast.parse(read(path))):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text = ast.get_docstring(node)
            if text and ">>>" in text:
                name = getattr(node, "name", module)
                yield pytest.param(module, text, id=f"{module}:{name}")


def read(path):
    return path.read_text(encoding="utf-8") if path.exists() else ""


def blocks(language):
    """Returns the fenced blocks of the README in that language, each with its line."""
    text = read(README)
    return [
        (text[: match.start(1)].count("\n"), match.group(1))
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    ]


def commands(script):
    """Returns the commands of a shell script, each a list of words."""
    found = []
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        found.append([])
        for word in words:
            if word in OPERATORS:
                found.append([])
            else:
                found[-1].append(word)
    return [words for words in found if words]


def readme_commands(program):
    return [
        pytest.param(words[1:], id=" ".join(words))
        for _, script in blocks("bash")
        for words in commands(script)
        if words[0] == program
    ]


def table_rows():
    """Returns the cells of those rows of the README's tables that name a TOML file."""
    rows = re.findall(r"^\| (.*) \|$", read(README), re.M)
    return [
        pytest.param(row.split(" | "), id=row.split(" | ")[0])
        for row in rows
        if ".toml`" in row
    ]


@pytest.mark.parametrize(("module", "text"), list(docstring_examples()))
def test_a_docstring_example_prints_what_it_shows(module, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    public = {name: getattr(nj, name) for name in vars(nj) if name[0] != "_"}
    names = public | {"jax": jax, "jnp": jnp, "optax": optax}
    names |= vars(importlib.import_module(module))
    test = doctest.DocTestParser().get_doctest(text, names, module, module, 0)
    output = []
    failed, _ = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=output.append)
    assert not failed, "\n".join(output)


def test_the_python_blocks_of_the_readme_run_in_order(monkeypatch):
    assert blocks("python"), f"{README} is missing, or has no python block"
    monkeypatch.chdir(ROOT)
    names = {"__name__": "readme"}
    for line, block in blocks("python"):
        # Empty lines before it, so that a traceback names the line of the README.
        exec(compile("\n" * line + block, README, "exec"), names)


def test_the_first_block_of_the_readme_prints_what_it_shows(capsys):
    exec(compile(blocks("python")[0][1], README, "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip() == blocks("text")[0][1].strip()


@pytest.mark.parametrize("args", readme_commands("make"))
def test_the_make_targets_of_the_readme_exist(args):
    makefile = read(ROOT / "Makefile")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    assert {word for word in args if "=" not in word} <= targets


def published():
    """Writes a small model in the place of the one that the README names."""
    config = ModelConfig(dim=16, n_layers=1, n_heads=2, max_seq_len=1024)
    params = gpt.init(config, 0)[1]
    huggingface.write_folder("Qwen3-0.6B", config, params, tokenizer=None)


@pytest.mark.parametrize("args", readme_commands("nanochat-jax"))
def test_the_commands_of_the_readme_parse(args, monkeypatch, tmp_path):
    for command in vars(cli).values():
        if inspect.isclass(command) and hasattr(command, "run"):
            monkeypatch.setattr(command, "run", lambda self: None)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    if "Qwen3-0.6B" in args:
        published()
    try:
        code = cli.main(args)
    except SystemExit as stop:  # as after `--help`
        code = stop.code
    assert not code


def test_the_files_the_readme_names_exist():
    links = re.findall(r"\]\(([^):#]+)\)", read(README))
    files = re.findall(r"\b(?:benchmarks|configs|examples)/[\w/]+\.\w+", read(README))
    assert {name for name in links + files if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("row", table_rows())
def test_the_sizes_in_the_readme_are_those_of_the_report(row):
    """`| name | `file` `--flag value` | MB of matrices | % of them | % of all |`"""
    file, *flags = re.findall(r"`([^`]+)`", row[1])
    config = Config.from_toml(ROOT / "configs" / file)
    for name, value in (flag.removeprefix("--").split() for flag in flags):
        config = dataclasses.replace(config, **{name.replace("-", "_"): int(value)})
    _, params = gpt.abstract_model(config)
    report = nj.memory_report(nj.build_optimizer(config, params), params)
    assert row[2:] == [
        f"{report.matrix_bytes / 1e6:.1f} MB",
        f"{100 * report.matrix_bytes / report.fp32_muon_bytes:.1f} %",
        f"{100 * report.total_bytes / report.fp32_muon_adamw_bytes:.1f} %",
    ]
