"""What all classes of settings share: their checks, and the file of a run."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from nanochat_jax import settings
from nanochat_jax.config.depth import derive

# Keys of the parent project, nanochat-rs-ternary, for parts that are not built here.
PARENT_ONLY = (
    "distill_kl_weight",
    "loop_scale_penalty",
    "mhc_lr",
    "mhc_n_streams",
)

RUN_KEYS: set[str] = {"depth"}
"""Keys that the file of a run may hold; `Config`, which has the others, adds them."""


class Settings:
    """A frozen dataclass of settings, checked when it is made."""

    def __post_init__(self) -> None:
        settings.check_types(self)
        settings.require(*self._checks())

    def _checks(self) -> list[settings.Check]:
        raise NotImplementedError

    @classmethod
    def from_toml(cls, path: str | Path, **flags: Any) -> Self:
        """Reads the fields of this class from a TOML file.

        The file may have the keys of a whole run: those of the other classes here are
        left alone. Files of the parent project load as they are; their keys for parts
        that are not built here are named in one warning.

        Args:
          path: A flat TOML file. It may also have `depth`; see `from_values`.
          **flags: Values in place of those in the file.

        Returns:
          The settings.

        Raises:
          ValueError: If the file cannot be read, or a key or value is not allowed.
        """
        values = settings.read_toml(path, tables=("galore_rank", "mesh"))
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
          values: Values by key. `depth` among them gives those that are not there; see
            `depth.derive`.
          source: Where they come from, for messages.

        Returns:
          The settings.

        Raises:
          ValueError: If a key or value is not allowed.
        """
        if "depth" in values:
            try:
                derived = derive(values["depth"], values.get("fallback", "adamw"))
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None
            values = {**derived, **values}
        unbuilt = [key for key in PARENT_ONLY if key in values]
        return settings.build(cls, values, source, [*RUN_KEYS, *unbuilt])
