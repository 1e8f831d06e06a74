"""What the documentation says is so: docstring examples, and blocks of its pages."""

import ast
import doctest
import importlib
import re
import shlex
import tarfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import nanochat_jax as nj
from nanochat_jax.commands import launch
from nanochat_jax.config import ModelConfig
from nanochat_jax.lm import huggingface
from nanochat_jax.lm.model import gpt

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
GUIDE = [
    DOCS / "index.md",
    *sorted(DOCS.glob("guide/*.md")),
    *sorted(DOCS.glob("how/*.md")),
]
PAGES = [
    pytest.param(path, id=str(path.relative_to(ROOT))) for path in [README, *GUIDE]
]
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


def blocks(language, page=README):
    """Returns the fenced blocks of a page in that language, each with its line.

    Blocks that include a file are left out: that file has tests of its own.
    """
    text = read(page)
    return [
        (text[: match.start(1)].count("\n"), match.group(1))
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
        if "--8<--" not in match.group(1)
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


def shown_commands(program):
    """Returns the arguments of all commands of a program, each once."""
    shown = {
        " ".join(words): words[1:]
        for page in [README, *GUIDE]
        for _, script in blocks("bash", page)
        for words in commands(script)
        if words[0] == program
    }
    return [pytest.param(args, id=name) for name, args in shown.items()]


@pytest.mark.parametrize(("module", "text"), list(docstring_examples()))
def test_a_docstring_example_prints_what_it_shows(module, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    public = {name: getattr(nj, name) for name in nj.__all__}
    names = public | {"jax": jax, "jnp": jnp, "optax": optax}
    names |= vars(importlib.import_module(module))
    test = doctest.DocTestParser().get_doctest(text, names, module, module, 0)
    output = []
    failed, _ = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=output.append)
    assert not failed, "\n".join(output)


@pytest.mark.parametrize("page", PAGES[1:])  # the README: tests/test_first_hour.py
def test_the_python_blocks_of_a_page_run_in_order(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {"__name__": "page"}
    for line, block in blocks("python", page):
        # Empty lines before it, so that a traceback names the line of the page.
        exec(compile("\n" * line + block, page, "exec"), names)


@pytest.mark.parametrize("args", shown_commands("make"))
def test_the_make_targets_of_the_pages_exist(args):
    makefile = read(ROOT / "Makefile")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    assert {word for word in args if "=" not in word} <= targets


def published():
    """Writes a small model in the place of the one that the README names."""
    config = ModelConfig(dim=16, n_layers=1, n_heads=2, max_seq_len=1024)
    params = gpt.init(config, 0)[1]
    huggingface.write_folder("Qwen3-0.6B", config, params, tokenizer=None)


@pytest.mark.parametrize("args", shown_commands("nanochat-jax"))
def test_the_commands_of_the_pages_parse(args, monkeypatch, tmp_path):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    if "Qwen3-0.6B" in args:
        published()
    if "--resume" in args:
        with tarfile.open(ROOT / "tests/data/checkpoint_format_1.tar.xz") as archive:
            archive.extractall(tmp_path / "runs" / "a", filter="data")
    assert launch.command_of(args)  # what cannot be parsed exits


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_names_exist(page):
    links = re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", read(page))
    files = re.findall(r"\b(?:benchmarks|configs|examples)/[\w/]+\.\w+", read(page))
    missing = {name for name in links if not (page.parent / name).exists()}
    assert missing | {name for name in files if not (ROOT / name).exists()} == set()
