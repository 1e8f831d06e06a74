"""Settings with which a training step fits a limit, the cheapest first.

Cheap is what costs little loss, and then what costs little time. Each of `levels` has
less state and weights than the one before, at some cost in loss. Of one level,
`relaxed` gives the settings that save memory at no loss, with rising cost in time.
Steps are compiled from shapes; nothing is allocated.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from nanochat_jax.config import Config, schema
from nanochat_jax.lm.planning.optimizer_summary import megabytes
from nanochat_jax.lm.planning.run_memory import abstract_run
from nanochat_jax.lm.training import compile_train_step
from nanochat_jax.optimizer import bytes_per_device, planned_bytes

_INT8 = {"use_8bit_optim": True}
_SPLIT = {**_INT8, "param_dtype": "bfloat16", "weight_rounding": "split"}
_SHORT = {**_SPLIT, "weight_rounding": "stochastic"}
_GALORE = {**_SHORT, "use_galore": True, "galore_residual": 1.0}

# By their loss over that of float32 Muon, docs/RESULTS.md: 1.000 with 8 bits, 1.002
# with 4, 1.007 for GaLore in 8 bits with a momentum of the rest, 1.015 without. A split
# master keeps 16 bits of a weight, and stochastic rounding 8.
LEVELS: tuple[dict[str, Any], ...] = (
    {},
    _INT8,
    {**_SPLIT, "master_bits": 8},
    _SHORT,
    {**_SHORT, "quant_bits": 4},
    {**_GALORE, "galore_rest_bits": 2},
    {**_GALORE, "galore_rest_bits": 0},
)
"""Settings by their cost in loss, each in place of those before it."""


class Trial(NamedTuple):
    """A compiled step with some settings changed.

    Attributes:
      settings: The settings that are changed, by key.
      peak_bytes: Planned peak on each device.
      fits: Whether it is within the limit.
    """

    settings: dict[str, Any]
    peak_bytes: int
    fits: bool


class Search(NamedTuple):
    """Steps compiled to find one within a limit.

    Attributes:
      limit: The limit, in bytes.
      trials: The steps by their cost, that of the settings as they are first.
    """

    limit: int
    trials: list[Trial]

    @property
    def fitting(self) -> Trial | None:
        """The cheapest step that fits, if any does."""
        return next((trial for trial in self.trials if trial.fits), None)

    @property
    def least(self) -> Trial:
        """The step with the lowest peak."""
        return min(self.trials, key=lambda trial: trial.peak_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Returns the search as plain values."""
        return {
            "bytes": self.limit,
            "fits": self.trials[0].fits,
            "tried": [trial._asdict() for trial in self.trials],
        }


def check(config: Config, peak: int) -> None:
    """Refuses a step that takes more than the limit of its run.

    Args:
      config: Settings of the run.
      peak: Planned peak of its step on each device.

    Raises:
      ValueError: If the peak is beyond the limit.
    """
    limit, asked = config.memory_limit_bytes, config.memory_limit
    schema.require(
        (
            limit is None or peak <= limit,
            f"`memory_limit` is {asked}, but the step is planned to take "
            f"{megabytes(peak)} on each device. `nanochat-jax plan` with the same "
            f"settings and `--memory-limit '{asked}'` names the cheapest that fit.",
        )
    )


def planned_peak(config: Config) -> int:
    """Returns the planned peak of a training step on each device.

    Args:
      config: Settings of the run.
    """
    step = compile_train_step(abstract_run(config))
    return planned_bytes(step)["peak_bytes"]


def search(
    config: Config, peak: int, peak_of: Callable[[Config], int] = planned_peak
) -> Search:
    """Finds the cheapest settings with which a step fits the limit of a run.

    Of the first level whose weights and state are within the limit, all steps are
    compiled until one fits. Of later ones it is first that step which took least memory
    there, and then those of less cost in time. A step is left out if it would not fit
    with half the temporaries that it has there, as few as bfloat16 makes of float32. If
    none fits, steps of the last level tell by how much.

    Args:
      config: Settings of the run, with a `memory_limit`.
      peak: Planned peak of its step.
      peak_of: Returns the planned peak for settings; it compiles.

    Raises:
      ValueError: If there is no limit.
    """
    limit = config.memory_limit_bytes
    if limit is None:
        raise ValueError("`memory_limit` must be set for a search for what fits it.")

    def attempt(other: Config) -> Trial:
        settings = changes(config, other)
        found = peak_of(other) if settings else peak
        return Trial(settings, found, found <= limit)

    trials = [attempt(config)]
    if trials[0].fits:
        return Search(limit, trials)
    steps, tried = [config], trials
    temps: list[int] = []
    for level, held in levels(config):
        steps = relaxed(level)
        if temps:
            least = temps.index(min(temps))
            enough = [held + temp // 2 <= limit for temp in temps]
            tried = [attempt(steps[least])] if enough[least] else []
            if tried and tried[0].fits:
                others = (attempt(x) for x in itertools.compress(steps[:least], enough))
                tried = _until_fit(itertools.chain(others, tried))
        else:
            tried = _until_fit(map(attempt, steps)) if held <= limit else []
            temps = [trial.peak_bytes - held for trial in tried]
        trials += (trial for trial in tried if trial.settings)
        if trials[-1].fits:
            return Search(limit, trials)
    if not tried:
        last = [steps[temps.index(min(temps))]] if temps else steps[-2:]
        trials += (trial for trial in map(attempt, last) if trial.settings)
    return Search(limit, trials)


def levels(config: Config) -> Iterator[tuple[Config, int]]:
    """Yields settings of falling memory and rising loss.

    Args:
      config: Settings to begin with.

    Yields:
      The settings, and the bytes of their weights and state on each device.
    """
    least = None
    for settings in LEVELS:
        if config.use_galore and "use_galore" in settings:
            # What is projected, and with what complement, is as it was asked for.
            settings = {**_SHORT, "galore_rest_bits": 0}
        other = dataclasses.replace(config, **settings)
        held = _held_bytes(other)
        if least is None or held < least:
            least = held
            yield other, held


def relaxed(config: Config) -> list[Config]:
    """Returns settings of falling memory and equal loss, each with those before it.

    These are blocks in a loop that are recomputed, the update in the backward pass, one
    sequence in a microbatch, and longer segments between hidden states.

    Args:
      config: Settings to begin with; they come first.
    """
    backward = {
        "update_in_backward": True,
        "scan_layers": True,
        "remat": config.remat,  # it recomputes by itself
    }
    steps: list[dict[str, Any]] = [
        # A single layer is no stack, of which one is updated at a time.
        *([backward] if config.n_layers > 1 else []),
        {
            "batch_size": 1,
            "grad_accum_steps": config.batch_size * config.grad_accum_steps,
        },
        {"remat_segment": max(config.remat_segment, _shortest(config.n_layers))},
    ]
    if not config.update_in_backward:
        steps.insert(0, {"scan_layers": True, "remat": True})
    found = [config]
    for settings in steps:
        other = dataclasses.replace(found[-1], **settings)
        if other != found[-1]:
            found.append(other)
    return found


def changes(config: Config, other: Config) -> dict[str, Any]:
    """Returns the settings in which a configuration differs from another, by key.

    Args:
      config: Settings before.
      other: Settings after.
    """
    pairs = ((key, getattr(other, key)) for key in dataclasses.asdict(config))
    return {key: value for key, value in pairs if value != getattr(config, key)}


def _until_fit(trials: Iterable[Trial]) -> list[Trial]:
    """Returns trials up to the first that fits, made one after another."""
    tried = []
    for trial in trials:
        tried.append(trial)
        if trial.fits:
            break
    return tried


def _held_bytes(config: Config) -> int:
    """Returns the bytes of weights and state on each device."""
    run = abstract_run(config)
    state = jax.eval_shape(run.tx.init, run.params)
    return bytes_per_device((run.params, state))


def _shortest(layers: int) -> int:
    """Returns the segment with the fewest hidden states, before and within it."""
    dividing = (i for i in range(1, layers + 1) if layers % i == 0)
    return min(dividing, key=lambda i: layers // i + (i if i > 1 else 0))
