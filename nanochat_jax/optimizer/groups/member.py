"""What a group changes in the part that a parameter plays."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nanochat_jax.config import Group
from nanochat_jax.transforms import MatrixAxes


def in_group(role: Any, group: Group | None, axes: MatrixAxes | None, ndim: int) -> Any:
    """Returns the role of a parameter in its group.

    One that goes from AdamW to Muon is a matrix, and has the axes that its name tells,
    or its two. One that goes from Muon to AdamW or Lion is a vector to reports.

    Args:
      role: Its role without the group.
      group: The group, if it is in one.
      axes: The axes that its name and shape tell, if they do.
      ndim: Number of its axes.
    """
    if group is None:
        return role
    changed: dict[str, Any] = {"reason": f"{role.reason}, group {group.match!r}"}
    if group.optimizer == "muon" and role.label != "matrix":
        assumed = axes is None and ndim == 2
        changed |= {"label": "matrix", "usual": role.label, "assumed": assumed}
        changed |= {"axes": MatrixAxes(0, 1) if assumed else axes}
    elif group.optimizer in ("adamw", "lion") and role.label == "matrix":
        changed |= {"label": "vector", "usual": "matrix"}
        changed |= {"axes": None, "assumed": False}
    return dataclasses.replace(role, group=group, **changed)


def require_use(
    groups: Sequence[Group],
    shapes: Mapping[str, tuple[int, ...]],
    roles: Mapping[str, Any],
) -> None:
    """Refuses groups whose settings are for none of their parameters.

    Args:
      groups: The groups.
      shapes: Shapes of the parameters by path.
      roles: Roles by path.

    Raises:
      ValueError: If Muon is asked for of fewer than two axes, a setting is for
        matrices or for others of which the group has none, or all that a group has is
        frozen; with all of them.
    """
    errors = []
    for group in groups:
        # By identity: rates may be traced.
        mine = {name: role for name, role in roles.items() if role.group is group}
        if group.optimizer == "muon":
            errors += [
                f"the group {group.match!r} has `optimizer = 'muon'`, which needs "
                f"matrices, but {name} has shape {shapes[name]}. Match others."
                for name in mine
                if len(shapes[name]) < 2
            ]
        labels = {role.label for role in mine.values()}
        if not (group.freeze or group.optional) and labels <= {"frozen"}:
            errors.append(
                f"the group {group.match!r} has no effect: all its parameters are "
                "frozen. Leave it out, or set `optional = true` in it."
            )
            continue
        idle = [*{"muon_scale", "muon_momentum"} & group.settings.keys()]
        idle = sorted(idle) if "matrix" not in labels else []
        idle += ["betas"] * (group.betas is not None and labels <= {"matrix"})
        if idle and labels:
            whose = "AdamW's or Lion's" if idle == ["betas"] else "Muon's"
            errors.append(
                f"the group {group.match!r} has {idle}, which are {whose} alone, and "
                f"its parameters are {sorted(labels)}: {', '.join([*mine][:3])}. Leave "
                "them out, or set `optimizer` in it."
            )
    if errors:
        raise ValueError("\n".join(errors))
