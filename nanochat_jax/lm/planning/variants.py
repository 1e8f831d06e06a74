"""Variants of the optimizer for `compare`, by name.

A name may be followed by settings of the optimizer, as in
`galore_8bit:galore_rank=32,quant_block_size=64`. The whole text is then the name of the
variant. Values are written as in TOML; strings may go without quotes.
"""

import dataclasses
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import optax

from nanochat_jax.config import Config, OptimizerConfig, schema, spelling
from nanochat_jax.lm.model import build_optimizer
from nanochat_jax.optimizer import build_adamw

BASELINE = "muon"
"""The variant with a float32 momentum, against which the others are measured."""

_PLAIN = {"use_8bit_optim": False, "use_galore": False}
_INT8 = {"use_8bit_optim": True, "quant_bits": 8}
_INT4 = {"use_8bit_optim": True, "quant_bits": 4}
_GALORE = {"use_galore": True}
_NO_RESIDUAL = _GALORE | {"galore_residual": 0.0, "galore_rest_bits": 0}
_MUON: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "muon_8bit": _INT8,
    "muon_4bit": _INT4,
    "galore": _GALORE,
    "galore_8bit": _GALORE | _INT8,
    "galore_4bit": _GALORE | _INT4,
    "galore_plain": _NO_RESIDUAL,
    "galore_plain_8bit": _NO_RESIDUAL | _INT8,
}
_ADAMW: dict[str, dict[str, Any]] = {"adamw": {}, "adamw_galore": _GALORE}

NAMES = (*_MUON, *_ADAMW)
"""The variants; `adamw` and `adamw_galore` are AdamW for all parameters."""

_DECLARED = schema.declared(OptimizerConfig)
# All variants train equally long, on the same random numbers.
_MUON_KEYS = _DECLARED.keys() - {"total_steps", "seed"}
_ADAMW_KEYS = {key for key, known in _DECLARED.items() if known.adamw}


class Variant(NamedTuple):
    """An optimizer to compare.

    Attributes:
      name: Its name, with the settings that follow it.
      config: Settings of its runs.
      build: Builds the optimizer, from settings and parameters.
    """

    name: str
    config: Config
    build: Callable[[Config, optax.Params], optax.GradientTransformationExtraArgs]


def parse_variants(
    names: Sequence[str], config: Config, adamw_lr: float
) -> list[Variant]:
    """Returns the variants by their names.

    Args:
      names: Names, each with settings or without.
      config: Settings of all variants, unless their names set others.
      adamw_lr: Peak learning rate of the AdamW variants.

    Raises:
      ValueError: If a name or setting is not known, a value is not allowed, or a
        variant is given twice.
    """
    variants, errors = [], []
    if len(set(names)) < len(names) or not names:
        errors.append(f"`variants` must name each variant once, got {[*names]}.")
    for name in names:
        try:
            variants.append(_variant(name, config, adamw_lr))
        except ValueError as error:
            errors += str(error).splitlines()
    schema.require(*((False, error) for error in errors))
    return variants


def _variant(text: str, config: Config, adamw_lr: float) -> Variant:
    source, (name, _, rest) = f"variant `{text}`", text.partition(":")
    hint = spelling.question(spelling.meant(name, NAMES))
    names = f"the name must be one of {', '.join(NAMES)}, got {name!r}."
    schema.require((name in NAMES, f"{source}: {names} {hint}".rstrip()))
    given = _read(rest, source) if rest else {}
    _check_keys(given, _ADAMW_KEYS if name in _ADAMW else _MUON_KEYS, source)
    values = dataclasses.asdict(config) | _PLAIN | (_MUON | _ADAMW)[name]
    if name in _ADAMW:
        values["lr"] = adamw_lr
    built = schema.build(Config, values | given, source)
    idle = sorted(_idle_keys(built) & given.keys())
    schema.require(
        (not idle, f"{source}: {idle} have no effect on it. Leave them out."),
        (
            name in _ADAMW or built.variant == name,
            f"{source}: its settings are those of `{built.variant}`. Name that one, or "
            "leave out what makes the difference, such as `galore_residual = 0`.",
        ),
    )
    return Variant(text, built, build_adamw if name in _ADAMW else build_optimizer)


def _idle_keys(config: Config) -> set[str]:
    """Returns the settings without effect on a variant."""
    return {
        key
        for key, known in _DECLARED.items()
        if known.needs and not any(getattr(config, name) for name in known.needs)
    }


def _read(text: str, source: str) -> dict[str, Any]:
    """Returns the settings of `key=value,key=value`; a value may hold commas too."""
    pairs = [pair.partition("=") for pair in re.split(r",(?=\s*\w+\s*=)", text)]
    schema.require(
        (
            all(sign for _, sign, _ in pairs),
            f"{source}: settings must be `key=value`, with commas between them.",
        )
    )
    return {key.strip(): _value(value.strip()) for key, _, value in pairs}


def _check_keys(given: Iterable[str], allowed: set[str], source: str) -> None:
    """Refuses settings of a run that are not a variant's own."""
    known = {field.name for field in dataclasses.fields(Config)}
    others = sorted(known.intersection(given) - allowed)
    schema.require(
        (
            not others,
            f"{source}: {others} may not follow its name. All variants share model, "
            "data, steps and seed, so give those as flags; AdamW has no use for what "
            "is Muon's.",
        )
    )


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
