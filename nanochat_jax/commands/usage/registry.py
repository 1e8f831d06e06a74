"""Commands by name. Their modules, most of which need JAX, are loaded when used."""

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from nanochat_jax.config import spelling

_OTHER_NAMES = {
    "compare": "benchmark bench ablate sweep",
    "doctor": "check info env diagnose",
    "generate": "sample infer inference chat predict complete run",
    "import": "load convert",
    "plan": "memory estimate size describe",
    "prepare-data": "prepare data tokenize tokenise dataset",
    "train": "fit pretrain finetune fine-tune",
}


class Command(NamedTuple):
    """A command: a dataclass of flags that can `run`.

    Attributes:
      place: Its module in this package and its class, `module.Class`.
      summary: First sentence of the docstring of the class.
    """

    place: str
    summary: str

    def load(self) -> Any:
        """Returns the class."""
        module, _, kind = self.place.partition(".")
        return getattr(importlib.import_module(f"nanochat_jax.commands.{module}"), kind)


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "train": Command(
            "train.Train",
            "Trains a GPT; every setting of the TOML file is also a flag.",
        ),
        "plan": Command(
            "plan.Plan",
            "Prints groups, exact bytes of state, and peak memory of a compiled step.",
        ),
        "compare": Command(
            "compare.Compare",
            "Trains variants of the optimizer on the same batches, and compares them.",
        ),
        "plot": Command("plot.Plot", "Draws the losses of runs in one figure."),
        "prepare-data": Command(
            "prepare_data.PrepareData",
            "Trains a byte-level BPE tokenizer on text, and writes the tokens of the "
            "text.",
        ),
        "generate": Command(
            "generate.Generate",
            "Continues a prompt with a trained model, and prints text as it is "
            "generated.",
        ),
        "import": Command(
            "import_.Import",
            "Writes a checkpoint of weights alone, with their tokenizer.",
        ),
        "export": Command(
            "export.Export",
            "Writes the weights of a checkpoint as safetensors, or as a Hugging Face "
            "folder.",
        ),
        "doctor": Command(
            "doctor.Doctor",
            "Checks versions, devices and plugins, and multiplies matrices on each "
            "device.",
        ),
    }
)
"""The commands, in the order of `--help`."""


def unknown(name: str) -> str:
    """Returns a message about a word that is no command.

    Args:
      name: The word.
    """
    near = [key for key, others in _OTHER_NAMES.items() if name in others.split()]
    near = near or spelling.meant(name.replace("_", "-"), COMMANDS)
    near = near or [f"--{name}"] * (name in ("help", "version"))
    hint = spelling.question(f"nanochat-jax {key}" for key in near)
    hint = hint or f"Commands: {', '.join(COMMANDS)}."
    return f"unknown command `{name}`. {hint}"
