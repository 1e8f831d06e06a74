"""What all classes of settings share: their checks, and the file of a run."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from nanochat_jax.config import schema
from nanochat_jax.config.depth import derive
from nanochat_jax.config.presets import shape_of

# Keys of the parent project, nanochat-rs-ternary, for parts that are not built here.
PARENT_ONLY = (
    "distill_kl_weight",
    "loop_scale_penalty",
    "mhc_lr",
    "mhc_n_streams",
)

RUN_KEYS: set[str] = {"depth", "model"}
"""Keys that the file of a run may hold; `Config`, which has the others, adds them."""


def derived_from(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what follows from `depth` or `model` among the values of a run.

    Raises:
      ValueError: If both are there, or one is not allowed.
    """
    schema.require(
        (
            not {"depth", "model"} <= values.keys(),
            "`depth` and `model` both give the shape of the model. Set one of them.",
        )
    )
    if "depth" in values:
        return derive(values["depth"], values.get("fallback", "adamw"))
    if "model" in values:
        return shape_of(values["model"], values.get("mesh", {}))
    return {}


class Settings:
    """A frozen dataclass of settings, checked when it is made."""

    def __post_init__(self) -> None:
        schema.check_types(self)
        schema.require(*self._checks())

    def _checks(self) -> list[schema.Check]:
        raise NotImplementedError

    @classmethod
    def from_toml(cls, path: str | Path, **flags: Any) -> Self:
        """Reads the fields of this class from a TOML file.

        The file may have the keys of a whole run: those of the other classes here are
        left alone. Files of the parent project load as they are; their keys for parts
        that are not built here are named in one warning.

        Args:
          path: A flat TOML file. It may also have `depth` or `model`; see
            `from_values`.
          **flags: Values in place of those in the file.

        Returns:
          The settings.

        Raises:
          ValueError: If the file cannot be read, or a key or value is not allowed.
        """
        values = schema.read_toml(path, tables=("galore_rank", "mesh"))
        unbuilt = [key for key in PARENT_ONLY if key in values]
        if unbuilt:
            warnings.warn(
                f"{path}: these keys are for parts that are not built here and have no "
                f"effect: {', '.join(unbuilt)}.",
                stacklevel=2,
            )
        return cls.from_values({**values, **flags}, str(path))

    @classmethod
    def from_values(cls, values: Mapping[str, Any], source: str) -> Self:
        """Takes the fields of this class from the values of a run.

        Args:
          values: Values by key. `depth` or `model` among them gives those that are not
            there; see `depth.derive` and `presets.shape_of`.
          source: Where they come from, for messages.

        Returns:
          The settings.

        Raises:
          ValueError: If a key or value is not allowed.
        """
        try:
            values = {**derived_from(values), **values}
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        unbuilt = [key for key in PARENT_ONLY if key in values]
        return schema.build(cls, values, source, [*RUN_KEYS, *unbuilt])
