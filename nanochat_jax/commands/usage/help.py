"""`--help`: flags in groups, each with the first sentence of its docstring."""

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from nanochat_jax.commands.usage.flags import Flag, flags_of, has_flag
from nanochat_jax.config import Config, schema

_FLAGS = {
    "Where to write, and what to go on from": (
        "checkpoint_dir",
        "resume",
        "allow_codec_change",
        "allow_data_change",
        "allow_tokenizer_change",
    ),
    "Other logs": ("tensorboard", "wandb", "profile_steps"),
    "Several processes": ("coordinator", "num_processes", "process_id"),
}

GROUPS = {name: title for title, names in _FLAGS.items() for name in names} | {
    key: known.group for key, known in schema.declared(Config).items()
}
"""Titles by field; flags of commands with settings are general if not listed here."""

FLAGS = ("-h", "--help", "--help-all")
"""Flags that ask for help; the last one prints descriptions in full."""

_EXAMPLES = (
    "nanochat-jax train --config-file configs/tiny_cpu_8bit_galore.toml",
    "nanochat-jax train --depth 4 --use-8bit-optim --checkpoint-dir runs/a",
    "nanochat-jax plan --config-file configs/nano_125m_8bit_galore.toml",
    "nanochat-jax generate --checkpoint runs/a --prompt 'def '",
)
_WIDEST, _COLUMN, _MARGIN = 100, 30, 2
_TYPES = {int: "INT", float: "FLOAT", str: "TEXT"}


def show_commands(console: Console, summaries: Mapping[str, str]) -> None:
    """Prints the list of commands.

    Args:
      console: Where to print.
      summaries: What each does, by name.
    """
    console.print(
        "Trains GPTs with Muon, 8-bit momentum and GaLore.\n", highlight=False
    )
    console.print(
        "usage: nanochat-jax COMMAND [FLAGS]\n", markup=False, highlight=False
    )
    rows = ((name, summary, "") for name, summary in summaries.items())
    _print_group(console, "Commands", rows)
    console.print(Text("Examples", style="bold"))
    for example in _EXAMPLES:
        console.print(Text(" " * _MARGIN + example, no_wrap=True), soft_wrap=True)
    console.print("\nMore of each: nanochat-jax COMMAND --help", highlight=False)


def show_command(
    console: Console, name: str, kind: type, default: Any = None, *, full: bool = False
) -> None:
    """Prints the purpose of a command, and its flags.

    Args:
      console: Where to print.
      name: Name of the command.
      kind: Its dataclass. The docstrings of it and of its bases describe the fields.
      default: An instance whose values are shown as defaults, if not those of the
        class.
      full: Whether all of each description is printed, not its first sentence.
    """
    flags = flags_of(kind)
    first, *others = paragraphs(kind)
    words = [_invocation(flag) for flag in flags.values() if flag.is_required]
    usage = " ".join(["usage: nanochat-jax", name, *words, "[FLAGS]"])
    described = descriptions(kind)
    width = min(console.width, _WIDEST)
    for paragraph in (first, usage, *others):
        console.print(textwrap.fill(paragraph, width) + "\n", markup=False)
    for title, fields in _groups(kind):
        rows = []
        for field in fields:
            text = described[field.name]
            value = _default(field, default)
            shown = text if full else first_sentence(text)
            rows.append((_invocation(flags[field.name]), shown, value))
        _print_group(console, title, rows)
    if not full and any(map(_has_more, described.values())):
        console.print(f"In full: nanochat-jax {name} --help-all", highlight=False)


def descriptions(kind: type) -> dict[str, str]:
    """Returns the descriptions of a dataclass's fields by name, from docstrings.

    Args:
      kind: Dataclass; it and its bases have `Attributes:` in their docstrings.
    """
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, section = (inspect.cleandoc(base.__doc__ or "")).partition("Attributes:")
        for name, text in re.findall(
            r"^  (\w+): (.*(?:\n    .*)*)", section, re.MULTILINE
        ):
            found[name] = " ".join(text.split())
    return found


def first_sentence(text: str) -> str:
    """Returns the first sentence of a text.

    Args:
      text: A description. A sentence begins with a capital, a number or code, and not
        after "et al.".
    """
    return re.split(r"(?<!al\.)(?<=[.])\s+(?=[A-Z0-9`])", text, maxsplit=1)[0]


def paragraphs(kind: type) -> list[str]:
    """Returns the paragraphs of a docstring before its sections.

    Args:
      kind: Class with the docstring.
    """
    text = inspect.cleandoc(kind.__doc__ or "").partition("\n\nAttributes:")[0]
    return [" ".join(part.split()) for part in text.split("\n\n")]


def _groups(kind: Any) -> Iterator[tuple[str, list[dataclasses.Field[Any]]]]:
    """Yields titles with their fields; only commands with settings have several."""
    has_settings, members = issubclass(kind, Config), {}
    for field in dataclasses.fields(kind):
        if not has_flag(kind, field.name):
            continue
        title = GROUPS.get(field.name, "General") if has_settings else "Flags"
        members.setdefault(title, []).append(field)
    yield from members.items()


def _invocation(flag: Flag) -> str:
    """Returns a flag with the type of its value, such as `--dim INT`."""
    if flag.is_positional:
        return f"{flag.name}..."
    if flag.is_switch:
        return flag.name.replace("--", "--[no-]", 1)
    return f"{flag.name} {_type(flag.hint)}"


def _type(hint: Any) -> str:
    """Returns a word for the type of a flag's value."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return "|".join(_type(arg) for arg in args if arg is not type(None))
    if origin is typing.Literal:
        return f"{{{','.join(map(str, args))}}}"
    if origin is tuple:
        each = [_type(arg) for arg in args if arg is not Ellipsis]
        return " ".join(each) + ("..." if Ellipsis in args else "")
    return "KEY=NUMBER,..." if origin is dict else _TYPES[hint]


def _default(field: dataclasses.Field[Any], default: Any) -> str:
    """Returns the value that a field has without its flag, in words."""
    if field.default is field.default_factory is dataclasses.MISSING:
        return "required"
    value = getattr(default, field.name, field.default)
    if value in (None, "", (), {}) or value is dataclasses.MISSING:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ",".join(f"{key}={number}" for key, number in value.items())
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return repr(value) if str(value) != str(value).strip() else str(value)


def _has_more(text: str) -> bool:
    return first_sentence(text) != text


def _print_group(
    console: Console, title: str, rows: Iterable[tuple[str, str, str]]
) -> None:
    """Prints a title, and below it names, texts and values in two columns."""
    console.print(Text(title, style="bold"))
    for name, text, value in rows:
        for line in _lines(name, text, value, min(console.width, _WIDEST)):
            console.print(line, soft_wrap=True)
    console.print()


def _lines(name: str, text: str, value: str, width: int) -> Iterator[Text]:
    """Yields the lines of a row; a long name has one of its own."""
    whole = f"{text} [{value}]" if value else text
    parts = textwrap.wrap(whole, width - _COLUMN) or [""]
    room = _COLUMN - _MARGIN - 1
    head = " " * _MARGIN + name
    if len(name) > room:
        yield Text(head, style="cyan")
        head = ""
    for part in parts:
        line = Text(head.ljust(_COLUMN) + part)
        line.stylize("cyan", 0, len(head))
        line.highlight_regex(r"\[[^\]]*\]$", "dim")
        yield line
        head = ""
