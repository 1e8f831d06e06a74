"""Rotary positions of a `config.json`: base and scaling, in both spellings.

Since transformers 5 they are `rope_parameters`; before, `rope_theta` with
`rope_scaling`, whose `rope_type` was once `type`.
"""

from collections.abc import Mapping
from typing import Any

DEFAULT_THETA = 10_000.0
"""Base where none is given, as for transformers."""

_LLAMA3 = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def read_rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Reads base and scaling of rotary positions.

    Args:
      config: Content of a `config.json`.

    Returns:
      `rope_theta` and `rope_scaling` of `ModelConfig`, and a line for each fault.
    """
    given = [config.get(key) or {} for key in ("rope_parameters", "rope_scaling")]
    if not all(isinstance(x, dict) for x in given):
        return {}, [f"`rope_parameters` or `rope_scaling` is not a table: {given}."]
    bases = [x["rope_theta"] for x in (*given, config) if x.get("rope_theta")]
    errors = []
    if any(base != bases[0] for base in bases):
        errors.append(f"`rope_theta` is given more than once: {bases}.")
    inner = {k: v for x in given for k, v in x.items() if v is not None}
    inner.pop("rope_theta", None)
    types = {str(inner.pop(key)) for key in ("rope_type", "type") if key in inner}
    scaling, faults = _read_scaling(types, inner)
    theta = bases[0] if bases else DEFAULT_THETA
    return {"rope_theta": theta, "rope_scaling": scaling}, errors + faults


def write_rope(theta: float, scaling: tuple[float, ...]) -> dict[str, Any]:
    """Returns `rope_parameters` of a `config.json`.

    Args:
      theta: Base of the frequencies.
      scaling: `rope_scaling` of `ModelConfig`.
    """
    if not scaling:
        return {"rope_theta": theta, "rope_type": "default"}
    values = dict(zip(_LLAMA3, scaling, strict=True))
    values[_LLAMA3[-1]] = int(values[_LLAMA3[-1]])
    return {**values, "rope_theta": theta, "rope_type": "llama3"}


def _read_scaling(
    types: set[Any], values: Mapping[str, Any]
) -> tuple[tuple[float, ...], list[str]]:
    if types - {"default", "llama3"} or len(types) > 1:
        names = ", ".join(sorted(map(str, types)))
        return (), [f"`rope_type` is {names}: only default and llama3 are read."]
    wanted = _LLAMA3 if "llama3" in types else ()
    missing = [key for key in wanted if key not in values]
    # A factor of 1 rotates all entries of a head.
    unknown = sorted(
        key
        for key, value in values.items()
        if key not in wanted and (key, value) != ("partial_rotary_factor", 1)
    )
    errors = [f"the rotary scaling has no `{key}`." for key in missing]
    errors += [f"the rotary scaling has an unknown key `{key}`." for key in unknown]
    return tuple(values.get(key, 0) for key in wanted), errors
