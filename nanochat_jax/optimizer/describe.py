"""A table of view, optimizer, rate and state of every parameter, with reasons."""

import dataclasses

import jax
import optax
from jax.tree_util import keystr

from nanochat_jax.codecs import is_quantized
from nanochat_jax.interop import as_arrays
from nanochat_jax.optimizer import advice
from nanochat_jax.optimizer.notes import notes_by_label
from nanochat_jax.optimizer.roles import Role
from nanochat_jax.optimizer.sharding import bytes_per_device
from nanochat_jax.transforms import ResolvedAxes, locate, owners, record

_COLUMNS = ("path", "shape", "view", "label", "optimizer", "rate", "state", "reason")


@dataclasses.dataclass(frozen=True)
class Described:
    """What an optimizer does with one parameter.

    Attributes:
      path: Its path, such as `"block/query/kernel"`.
      shape: Its shape.
      view: Shape of the matrices it is seen as, `None` if it is not.
      label: Its label; empty where the optimizer does not go by labels.
      optimizer: Name of its optimizer, as far as is known.
      rate: Its learning rate in words, as far as is known.
      state: Fields of its state, such as `"momentum Int8, basis Int4"`.
      state_bytes: Bytes of that.
      reason: Why it has this label and this view; `"assumed"` where two axes are taken
        as `(fan_in, fan_out)` since nothing says otherwise.
    """

    path: str
    shape: tuple[int, ...]
    view: tuple[int, ...] | None
    label: str
    optimizer: str
    rate: str
    state: str
    state_bytes: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Description:
    """What an optimizer does with the parameters of a model; prints as a table.

    Attributes:
      leaves: The parameters, in the order of the tree.
      warnings: What a user should look at.
    """

    leaves: tuple[Described, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        sizes = lambda shape: "" if shape is None else "x".join(map(str, shape)) or "()"
        rows = [
            (
                leaf.path, sizes(leaf.shape), sizes(leaf.view), leaf.label,
                leaf.optimizer, leaf.rate, leaf.state, leaf.reason,
            )
            for leaf in self.leaves
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) for cell, width in zip(row, widths, strict=True)
            )
            for row in [_COLUMNS, *rows]
        ]
        warnings = [f"warning: {text}" for text in self.warnings]
        return "\n".join(line.rstrip() for line in [*lines, *warnings])

    __repr__ = __str__


def describe(tx: optax.GradientTransformation, params: optax.Params) -> Description:
    """Describes view, optimizer, rate and state of every parameter, with the reason.

    For `muon` and `build_optimizer` label, view and reason are those that their `init`
    settles. For other chains the table has what their state shows.

    Example:
      >>> params = {"attn": {"q_einsum": {"w": jnp.ones((4, 32, 8))}}}
      >>> description = describe(muon(0.02, bits=8, min_size=1), params)
      >>> description.leaves[0].view, description.leaves[0].state
      ((32, 32), 'momentum Int8')
      >>> print(description)  # doctest: +ELLIPSIS
      path             shape   view   label   optimizer  rate  state          reason
      attn/q_einsum/w  4x32x8  32x32  matrix  Muon       0.02  momentum Int8  ...

    Args:
      tx: A transformation.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      The description; `print` shows it as a table.
    """
    params = as_arrays(params)
    state, told = record.recorded_init(tx, params)
    held = _held(owners.with_layout(state, {}), params)
    leaves = []
    for path, x in jax.tree.leaves_with_path(params):
        name, shape = keystr(path), tuple(getattr(x, "shape", ()))
        role = told.roles.get(name)
        note = told.optimizers.get(name)
        state, size = held.get(name, ("", 0))
        leaves.append(
            Described(
                path=keystr(path, simple=True, separator="/"),
                shape=shape,
                view=_view(role, told.views.get(name), shape),
                label=role.label if role else "",
                optimizer=note.name if note else "",
                rate=note.rate_in_words if note else "",
                state=state,
                state_bytes=size,
                reason=_reason(role),
            )
        )
    warnings = (
        *advice.without_effect(leaves, notes_by_label(told)),
        *advice.frozen(params, leaves),
        *advice.unnamed_heads(leaves),
        *advice.moved(told, params),
    )
    return Description(tuple(leaves), warnings)


def _view(
    role: Role | None, view: ResolvedAxes | None, shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    if role is not None and role.axes is not None:
        return role.axes.view_shape(shape)
    return view and view.view_shape


def _reason(role: Role | None) -> str:
    if role is None:
        return ""
    return f"{role.reason}, assumed" if role.assumed else role.reason


def _held(state: optax.OptState, params: optax.Params) -> dict[str, tuple[str, int]]:
    """Returns fields and bytes of the state of each parameter, by path."""
    places = locate(state, params)
    fields: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for path, node in jax.tree.leaves_with_path(state, is_leaf=is_quantized):
        place = places[keystr(path)]
        if place.name is None or not place.fields:
            continue
        kind = type(node.codec).__name__ if is_quantized(node) else node.dtype.name
        # A momentum of the complement is the complement's, as its codec is named.
        field = place.field(("complement",)) or place.fields[-1]
        fields.setdefault(place.name, []).append(f"{field} {kind}")
        sizes[place.name] = sizes.get(place.name, 0) + bytes_per_device(node)
    return {name: (", ".join(fields[name]), sizes[name]) for name in fields}
