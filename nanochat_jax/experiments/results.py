"""Results of a comparison: mean and standard deviation over seeds, by variant."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from nanochat_jax.experiments.speed import Speed
from nanochat_jax.experiments.trials import Trial
from nanochat_jax.lm.planning import BASELINE
from nanochat_jax.lm.tracking import read_metrics

Results = Mapping[tuple[str, int], Mapping[str, Any]]


def summarize(
    trials: Sequence[Trial], results: Results, speeds: Mapping[str, Speed]
) -> dict[str, dict[str, Any]]:
    """Returns the numbers of each variant over the seeds with a result.

    Args:
      trials: Trials of the comparison.
      results: Results by variant and seed, as far as there are any.
      speeds: Speeds by variant, if they were measured.

    Returns:
      By variant: `val_loss`, `val_bpb` and `loss_ratio`, the mean ratio to float32 Muon
      with the same seed, with standard deviations from two seeds on; bytes and speeds;
      and losses by seed. Unknown numbers are `None`.
    """
    done = [trial for trial in trials if (trial.variant, trial.seed) in results]
    names = dict.fromkeys(trial.variant for trial in done)
    return {
        name: {
            **_losses([t for t in done if t.variant == name], results),
            **_speed(name, speeds),
        }
        for name in names
    }


def table(variants: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns a summary as a table.

    Args:
      variants: Numbers by variant, from `summarize`.
    """
    seeds = max(len(values["seeds"]) for values in variants.values())
    caption = f"Mean ± standard deviation over seeds ({seeds}); bytes in MB."
    if BASELINE not in variants:
        caption += f" No ratios, since `{BASELINE}` is not among the variants."
    result = Table(title="Comparison", caption=caption, box=box.SIMPLE, pad_edge=False)
    result.add_column("variant", overflow="fold", min_width=14)
    for name in (
        "val\nloss", "bits/\nbyte", "loss\nratio", "matrix\nstate",
        "whole\nstate", "temp", "speed\nratio",
    ):  # fmt: skip
        result.add_column(name, justify="right", no_wrap=True)
    for name, values in variants.items():
        result.add_row(re.sub("([:,])", r"\1\n", name), *_cells(values))
    return result


def _losses(trials: Sequence[Trial], results: Results) -> dict[str, Any]:
    """Returns losses and bytes of one variant; lists are by seed."""
    own = [results[trial.variant, trial.seed] for trial in trials]
    base = [results.get((BASELINE, trial.seed), {}).get("val_loss") for trial in trials]
    val = [result["val_loss"] for result in own]
    ratios = [a and b and a / b for a, b in zip(val, base, strict=True)]
    same = ("matrix_state_bytes", "total_state_bytes", "temp_bytes")
    return {
        "val_loss": _mean(val),
        "val_loss_std": _deviation(val),
        "val_bpb": _mean([result["val_bpb"] for result in own]),
        "loss_ratio": _mean(ratios),
        "loss_ratio_std": _deviation(ratios),
        **{key: own[0][key] for key in same},
        "seeds": [trial.seed for trial in trials],
        "val_losses": val,
        "loss_ratios": ratios,
        "seconds": [result["seconds"] for result in own],
        "errors": [result["error"] for result in own],
        "losses": [_curve(trial.metrics) for trial in trials],
    }


def _speed(name: str, speeds: Mapping[str, Speed]) -> dict[str, float | None]:
    own, base = speeds.get(name), speeds.get(BASELINE)
    return {
        "tokens_per_s": own.tokens_per_s if own else None,
        "tokens_per_s_ratio": own.ratio(base) if own and base else None,
    }


def _curve(path: Path) -> list[dict[str, Any]]:
    """Returns the losses of a run, by step."""
    keys = ("step", "loss", "val_loss")
    return [{k: line[k] for k in keys if k in line} for line in read_metrics(path)]


def _mean(values: Sequence[float | None]) -> float | None:
    """Returns the mean, if no run is lost: over the others it would flatter."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _deviation(values: Sequence[float | None]) -> float | None:
    """Returns the standard deviation, if there are two values and no run is lost."""
    known = [value for value in values if value is not None]
    enough = len(known) > 1 and len(known) == len(values)
    return statistics.stdev(known) if enough else None


def _cells(values: Mapping[str, Any]) -> Iterable[str]:
    megabytes = lambda count: _text("{:.2f}", count and count / 1e6)
    val_loss = _with_deviation(values["val_loss"], values["val_loss_std"])
    yield "diverged" if any(values["errors"]) else val_loss
    yield _text("{:.4f}", values["val_bpb"])
    yield _with_deviation(values["loss_ratio"], values["loss_ratio_std"])
    yield megabytes(values["matrix_state_bytes"])
    yield megabytes(values["total_state_bytes"])
    yield megabytes(values["temp_bytes"])
    yield _text("{:.2f}", values["tokens_per_s_ratio"])


def _with_deviation(mean: float | None, deviation: float | None) -> str:
    line = "" if deviation is None else f"\n± {deviation:.4f}"
    return _text("{:.4f}", mean) + line


def _text(form: str, value: float | None) -> str:
    return "-" if value is None else form.format(value)
