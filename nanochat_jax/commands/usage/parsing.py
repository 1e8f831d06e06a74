"""Values of flags from words, with every word that is wrong.

argparse takes the words apart. It stops at the first error and ends the process, so it
is asked again without the flag that it met; values are read and checked by their types.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nanochat_jax.commands.usage.flags import Flag, flags_of
from nanochat_jax.commands.usage.help import descriptions, first_sentence
from nanochat_jax.commands.usage.words import value_of
from nanochat_jax.config import spelling

_SWITCHED = ("true", "false", "yes", "no", "on", "off", "0", "1")


class Parsed(NamedTuple):
    """Values of flags, and what is wrong with words.

    Attributes:
      values: Values by field, of the flags that are given and can be read.
      errors: A line for each error.
    """

    values: dict[str, Any]
    errors: list[str]


def parse(kind: Any, args: Sequence[str]) -> Parsed:
    """Returns the values of the flags of a command.

    Args:
      kind: Dataclass of the command.
      args: Words after its name.
    """
    flags = flags_of(kind)
    given, rest, errors = _apart(flags, args)
    alone, unknown = _sorted(rest, flags)
    errors += unknown
    first = next((flag for flag in flags.values() if flag.is_positional), None)
    if first and alone:
        given[first.field] = alone
    elif alone:
        errors += [_unexpected(word, flags, given) for word in alone]
    values: dict[str, Any] = {}
    for field, found in given.items():
        flag = flags[field]
        words = [found] if isinstance(found, str) else found
        try:
            values[field] = found if flag.is_switch else value_of(words, flag.hint)
        except ValueError as error:
            errors.append(f"`{flag.name}` {error}")
    told, named = descriptions(kind), " ".join(errors)
    for flag in flags.values():
        missing = flag.is_required and flag.field not in given
        if missing and f"`{flag.name}`" not in named:
            meaning = first_sentence(told[flag.field])
            errors.append(f"`{flag.name}` is required: {meaning}")
    return Parsed(values, errors)


def _apart(
    flags: Mapping[str, Flag], args: Sequence[str]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Returns words by field, those that belong to no flag, and errors."""
    parser = _parser(flags)
    by_name = {flag.name: flag for flag in flags.values()}
    words = [_with_dashes(word) for word in args]
    errors: list[str] = []
    while True:
        try:
            given, rest = parser.parse_known_args(words)
            return vars(given), rest, errors
        except argparse.ArgumentError as error:
            name = str(error.argument_name).split("/")[0]
            errors.append(_wrong_count(by_name[name], words))
            words = _without(name, words)


def _parser(flags: Mapping[str, Flag]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
    )
    for flag in flags.values():
        if flag.is_switch:
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        elif flag.takes is None:
            how = {"nargs": "+", "action": "extend"}
        else:
            how = {"nargs": None if flag.takes == 1 else flag.takes}
        if not flag.is_positional:
            parser.add_argument(flag.name, dest=flag.field, **how)
    return parser


def _without(name: str, words: Sequence[str]) -> list[str]:
    """Returns words without a flag and its values, wherever it is given."""
    kept, is_value = [], False
    for word in words:
        if _is_flag(word):
            is_value = word.partition("=")[0].replace("--no-", "--", 1) == name
        if not is_value:
            kept.append(word)
    return kept


def _with_dashes(word: str) -> str:
    """Returns a flag as it is named, `--grad-clip` for `--grad_clip`."""
    name, is_value, value = word.partition("=")
    return name.replace("_", "-") + is_value + value if _is_flag(word) else word


def _is_flag(word: str) -> bool:
    return re.match(r"--?[a-zA-Z]", word) is not None


def _sorted(
    rest: Sequence[str], flags: Mapping[str, Flag]
) -> tuple[list[str], list[str]]:
    """Returns the words that stand alone, and a line for each unknown flag.

    Words behind an unknown flag are its values.
    """
    by_name = {flag.name: flag for flag in flags.values() if not flag.is_positional}
    alone, unknown, is_value = [], [], False
    for word in rest:
        if _is_flag(word):
            unknown.append(_unknown(word.partition("=")[0], by_name))
            is_value = True
        elif not is_value:
            alone.append(word)
    return alone, unknown


def _wrong_count(flag: Flag, words: Sequence[str]) -> str:
    """Returns a line about a flag with a value too many, or too few of them."""
    if flag.is_switch:
        off = flag.name.replace("--", "--no-", 1)
        return f"`{flag.name}` takes no value. Write `{flag.name}` or `{off}` alone."
    wanted = "a value" if (flag.takes or 1) == 1 else f"{flag.takes} values"
    behind = [words[i + 1 :] for i, word in enumerate(words) if word == flag.name]
    counts = [
        next((i for i, word in enumerate(after) if _is_flag(word)), len(after))
        for after in behind
    ]
    got = min(counts, default=0)
    after = behind[counts.index(got)] if behind else ()
    line = f"`{flag.name}` needs {wanted}, got {got or 'none'}."
    if not got and after and not after[0].startswith("--"):
        line += f" A value that begins with a dash is written `{flag.name}={after[0]}`."
    return line


def _unknown(word: str, by_name: Mapping[str, Flag]) -> str:
    """Returns a line about a flag that is not known."""
    fields = {flag.field: flag for flag in by_name.values()}
    field = word.lstrip("-").replace("-", "_").lower()
    off = field.startswith("no_")
    names = [
        fields[near].name.replace("--", "--no-", 1)
        if off and fields[near].is_switch
        else fields[near].name
        for near in spelling.meant(field.removeprefix("no_"), fields)
    ]
    return f"unknown flag `{word}`. {spelling.question(names)}".strip()


def _unexpected(word: str, flags: Mapping[str, Flag], given: Mapping[str, Any]) -> str:
    """Returns a line about a word that belongs to no flag."""
    key, has_value, value = word.partition("=")
    field = key.replace("-", "_")
    missing = [f for f in flags.values() if f.is_required and f.field not in given]
    meant = None
    if word.lower() in _SWITCHED:
        return f"unexpected `{word}`. Switches take no value: `--NAME`, `--no-NAME`."
    if has_value and field in flags:
        meant = f"{flags[field].name} {value}"
    elif word.endswith(".toml") and "config_file" in flags:
        meant = f"--config-file {word}"
    elif field in flags or word == "help":
        meant = f"--{key}"
    elif len(missing) == 1:
        meant = f"{missing[0].name} {word}"
    elif "text" in flags:
        meant = f"--text {word}"
    return f"unexpected `{word}`. {spelling.question([meant] if meant else [])}".strip()
