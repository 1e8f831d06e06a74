"""Base class of all settings: how they are checked, and read from the file of a run."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from nanochat_jax.config import schema
from nanochat_jax.config.depth import derive
from nanochat_jax.config.presets import shape_of
from nanochat_jax.config.removed import REMOVED, refused

# Keys of the parent project, nanochat-rs-ternary, for parts that are not built here.
PARENT_ONLY = (
    "distill_kl_weight",
    "loop_scale_penalty",
    "mhc_lr",
    "mhc_n_streams",
)


def derived_from(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that follow from `depth`, `model` or `update_in_backward`.

    Args:
      values: Values of a run by key.

    Raises:
      ValueError: If `depth` and `model` are both given, or one is not allowed.
    """
    schema.require(
        (
            not {"depth", "model"} <= values.keys(),
            "`depth` and `model` both give the shape of the model. Set one of them.",
        )
    )
    derived: dict[str, Any] = {}
    if "depth" in values:
        derived = derive(values["depth"], values.get("fallback", "adamw"))
    if "model" in values:
        derived = shape_of(values["model"], values.get("mesh", {}))
    if values.get("update_in_backward") is True:
        derived = {**derived, "scan_layers": True}
    return derived


class Settings:
    """A frozen dataclass of settings, checked when it is made."""

    def __post_init__(self) -> None:
        schema.check_types(self)
        least = {
            key: known.least
            for key, known in schema.declared(self).items()
            if known.least is not None
        }
        schema.require(*schema.lower_bounds(self, least), *self._checks())

    def _checks(self) -> list[schema.Check]:
        """Returns the checks that take more than the least value of a field."""
        raise NotImplementedError

    @classmethod
    def from_toml(
        cls,
        path: str | Path,
        *,
        derive: Callable[[Mapping[str, Any]], dict[str, Any]] = derived_from,
        **flags: Any,
    ) -> Self:
        """Reads the fields of this class from a TOML file.

        The file may have the keys of a whole run; the keys of other classes are left
        alone. Keys without effect, of parts of the parent project that are not built
        here and of parts that were removed, are named in a warning.

        Args:
          path: A flat TOML file. It may also have `depth` or `model`; see
            `from_values`.
          derive: As for `from_values`.
          **flags: Values in place of those in the file.

        Returns:
          The settings.

        Raises:
          ValueError: If the file cannot be read, or a key or value is not allowed.
        """
        values = schema.read_toml(path, tables=("galore_rank", "mesh"))
        _warn(
            path, values, PARENT_ONLY, "are for parts that are not built here and have"
        )
        neutral = REMOVED.keys() - {line.split("`")[1] for line in refused(values)}
        _warn(path, values, sorted(neutral), "are removed and, as they are set, have")
        return cls.from_values({**values, **flags}, str(path), derive)

    @classmethod
    def from_values(
        cls,
        values: Mapping[str, Any],
        source: str,
        derive: Callable[[Mapping[str, Any]], dict[str, Any]] = derived_from,
    ) -> Self:
        """Takes the fields of this class from the values of a run.

        Args:
          values: Values by key. From `depth` or `model` follow other values where none
            are given; see `depth.derive` and `presets.shape_of`.
          source: Where the values come from, for messages.
          derive: Function from the values to others that follow from them.

        Returns:
          The settings.

        Raises:
          ValueError: If a key or value is not allowed.
        """
        try:
            values = _with_groups({**derive(values), **values})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        ignored = [key for key in (*PARENT_ONLY, *REMOVED) if key in values]
        others, errors = [*_keys_of_a_run(), *ignored], refused(values)
        gone = {line.split("`")[1] for line in errors}  # one message for each is enough
        values = {key: value for key, value in values.items() if key not in gone}
        return schema.build(cls, values, source, others, errors)


def _keys_of_a_run() -> set[str]:
    """Returns the keys that the file of a run may hold: all that a class declares."""
    keys, classes = {"depth", "group", "model"}, Settings.__subclasses__()
    while classes:
        cls = classes.pop()
        keys |= schema.declared(cls).keys()
        classes += cls.__subclasses__()
    return keys


def _with_groups(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values with the tables `[[group]]` under the name of their field.

    Raises:
      ValueError: If `group` is no array of tables.
    """
    if "group" not in values:
        return dict(values)
    tables = values["group"]
    schema.require(
        (
            isinstance(tables, list) and all(isinstance(x, dict) for x in tables),
            f"`group` must be tables, `[[group]]` with `match` below it, got {tables}.",
        )
    )
    rest = {key: value for key, value in values.items() if key != "group"}
    return {**rest, "groups": tables}


def _warn(
    path: str | Path, values: Mapping[str, Any], keys: Iterable[str], told: str
) -> None:
    """Warns, where the file is loaded, of keys that have no effect."""
    found = [key for key in keys if key in values]
    if found:
        message = f"{path}: these keys {told} no effect: {', '.join(found)}."
        warnings.warn(message, stacklevel=3)
