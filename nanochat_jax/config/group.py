"""Settings of some of the parameters: a `[[group]]` table in the file of a run."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

from nanochat_jax.config import schema

Rate = float | Callable[[Any], Any]
"""A learning rate: a number, which may be traced, or an Optax schedule."""

_OF_MUON = ("muon_scale", "muon_momentum")


@dataclasses.dataclass(frozen=True)
class Group:
    """Settings of the parameters whose paths match a pattern.

    Whatever is not given is as for other parameters of their kind. Of several groups
    that match a parameter, the first one has it.

    Example:
      >>> head = Group("head", lr=0.004, betas=(0.8, 0.95))
      >>> scales = Group(".*/(scale|bias)", lr=0.01, optional=True)

    Attributes:
      match: Regular expression for the whole path of a parameter, such as
        `blocks/0/attention/query/kernel`, or of a module around it, as in `freeze`:
        `blocks/.*/attention` has all parameters of these modules.
      lr: Peak learning rate, under the warm-up and the decay of the run; an Optax
        schedule is taken as it is.
      weight_decay: Decoupled weight decay.
      betas: Decays of AdamW or Lion.
      muon_momentum: Decay of the momentum of matrices.
      muon_scale: Shape rule of the updates of matrices, as in `scale_by_shape`.
      optimizer: Optimizer, "muon", "adamw" or "lion". Muon needs matrices.
      freeze: Whether the parameters are left as they are.
      optional: Whether the group may have no parameter; otherwise that is an error.
    """

    match: str
    lr: Rate | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None
    muon_momentum: float | None = None
    muon_scale: Literal["width", "rms", "none"] | None = None
    optimizer: Literal["muon", "adamw", "lion"] | None = None
    freeze: bool = False
    optional: bool = False

    def __post_init__(self) -> None:
        schema.check_types(self)
        given = [name for name in self.settings if name != "freeze"]
        idle = [*_OF_MUON] if self.optimizer in ("adamw", "lion") else []
        idle += ["betas"] * (self.optimizer == "muon")
        idle = [name for name in idle if name in given]
        wrong = _why_no_pattern(self.match)
        schema.require(
            (
                not wrong,
                f"`match` must be a regular expression, got {self.match!r}: {wrong}.",
            ),
            *schema.lower_bounds(
                self, {x: 0 for x in ("lr", "weight_decay") if x in given}
            ),
            *(
                (all(0 <= b < 1 for b in betas), f"`{name}` must lie in [0, 1).")
                for name, betas in (
                    ("betas", self.betas or ()),
                    ("muon_momentum", [self.muon_momentum or 0.0]),
                )
            ),
            (not idle, f"{idle} have no effect with `optimizer = {self.optimizer!r}`."),
            (
                not (self.freeze and given),
                f"`freeze` leaves no effect to {given}. Leave them out.",
            ),
        )

    @classmethod
    def from_table(cls, table: Any) -> Self:
        """Returns the group of a table.

        Args:
          table: Values by key, or a group.

        Raises:
          TypeError: If a key or value is not allowed, with all that are not.
        """
        if isinstance(table, cls):
            return table
        if not isinstance(table, Mapping) or "match" not in table:
            raise TypeError(f"must be a table with the key `match`, got {table!r}.")
        source = f"with match {table['match']!r}"
        try:
            return schema.build(cls, table, source)
        except ValueError as error:
            raise TypeError(str(error)) from None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that differ from those of other parameters, by name."""
        others = ("match", "optional")
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in others
        }
        # Not by `==`: zero is a setting, and a rate may be traced.
        return {
            name: x for name, x in values.items() if x is not None and x is not False
        }


def _why_no_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return "" if pattern else "it is empty"
