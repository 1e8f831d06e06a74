"""Contenders of `benchmarks/tuned_losses.py`, and the settings it searches for each."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

Settings = Mapping[str, Any]
Axes = Mapping[str, tuple[Any, ...]]

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Contender(NamedTuple):
    """A variant of `compare`, its settings beside its parent's, what is searched."""

    variant: str
    settings: Settings = NOTHING
    axes: Axes = NOTHING
    parent: str | None = "Muon"


RATE = {"lr": (0.002, 0.003, 0.004, 0.006, 0.009, 0.013, 0.02, 0.03, 0.045)}
DECAY = {"weight_decay": (0.0, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8)}
MOMENTUM = {"muon_momentum": (0.8, 0.85, 0.9, 0.95)}
SOME_DECAY = {"weight_decay": DECAY["weight_decay"][1:]}  # for what needs one
FLOORS = dict.fromkeys(("row_floor", "update_floor"), (0.0, 0.25, 0.5, 1.0, 1.5, 2.0))
NORMUON = {"normuon_beta": (0.8, 0.9, 0.95, 0.99)}
SOAP = {
    "precondition_beta": (0.8, 0.9, 0.95, 0.98),
    **MOMENTUM,
    **RATE,
    "precondition_every": (1, 3, 10, 30),
    **DECAY,
}
AVERAGE = {"average_horizon": (5, 10, 20, 40, 80), "average_start_frac": (0.6, 0.8)}

MUON = {
    "lr": 0.009,
    "weight_decay": 0.025,
    "fallback_lr": 0.01,
    "muon_momentum": 0.85,
    "adam_betas": [0.9, 0.99],
}
MUON_AXES = {
    **DECAY,
    **RATE,
    "fallback_lr": (0.0013, 0.0025, 0.005, 0.01, 0.02),
    "adam_betas": ([0.9, 0.9], [0.9, 0.95], [0.9, 0.99], [0.9, 0.995]),
    **MOMENTUM,
}
FLOORED = {
    "cautious_decay": True,
    "weight_decay": 0.05,
    "row_floor": 0.5,
    "update_floor": 0.0,
}
ROWS = {"normalize_rows": "normuon", "normuon_beta": 0.95}
SHORT = {"precondition": "short", "precondition_every": 10, "precondition_beta": 0.9}

SOAP_SHORT = "SOAP-Muon, short side"
CONTENDERS = {
    "Muon": Contender("muon", MUON, MUON_AXES, None),
    "Muon, 8 bits": Contender("muon_8bit"),
    "Muon, 4 bits": Contender("muon_4bit"),
    SOAP_SHORT: Contender("muon_8bit", SHORT | {"quant_block_size": 256}, SOAP),
    "cautious, floors": Contender("muon_8bit", FLOORED, SOME_DECAY | FLOORS | RATE),
    "NorMuon": Contender(
        "muon_8bit", {**ROWS, "lr": 0.013}, RATE | DECAY | NORMUON | MOMENTUM
    ),
    "fixed norms": Contender(
        "muon_8bit", {"fixed_norm": True, "weight_decay": 0.0}, RATE | MOMENTUM
    ),
    "cautious, floors, average": Contender(
        "muon_8bit",
        {"average_horizon": 20, "average_start_frac": 0.8},
        AVERAGE | RATE | SOME_DECAY,
        "cautious, floors",
    ),
    "SOAP-Muon, short side, 4 bits": Contender("muon_4bit", parent=SOAP_SHORT),
    "SOAP-Muon, both sides": Contender(
        "muon_8bit", {"precondition": "both"}, parent=SOAP_SHORT
    ),
    "SOAP-Muon, short side, NorMuon": Contender(
        "muon_8bit", ROWS, RATE | DECAY | NORMUON | MOMENTUM, SOAP_SHORT
    ),
    "SOAP-Muon, short side, cautious, floors": Contender(
        "muon_8bit", FLOORED, SOME_DECAY | FLOORS | RATE, SOAP_SHORT
    ),
}
