"""Exact bytes of an optimizer state, and of the program that updates it.

Nothing is allocated: shapes and types come from `jax.eval_shape`, the temporaries from
the compiler's own plan.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.tree_util import keystr

from nanochat_jax.codecs import is_quantized
from nanochat_jax.interop import as_arrays
from nanochat_jax.optimizer.roles import settle
from nanochat_jax.optimizer.sharding import (
    bytes_per_device,
    shardings_of,
    state_sharding,
)
from nanochat_jax.transforms import Place, locate, owners, record


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """Arrays of one type in one field of the state, for parameters of one label.

    Attributes:
      label: Label of the parameters, or `"other"` for what belongs to none (counts).
      field: Field of the state, such as `momentum` or `momentum.scales`.
      dtype: Type of its arrays.
      entries: Numbers held; where a byte holds two codes, bytes.
      bytes: Bytes held.
      device_bytes: Bytes that one device holds of them, if several hold the state.
    """

    label: str
    field: str
    dtype: str
    entries: int
    bytes: int
    device_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes of an optimizer state beside those of the float32 baselines.

    Attributes:
      rows: Bytes by label, field and type.
      params: Number of parameters by label.
      full_rank: Paths of the matrices that `galore` leaves unprojected.
      leaf_bytes: Bytes held for each parameter that has state, by path as
        `jax.tree_util.keystr` has it.
    """

    rows: tuple[MemoryRow, ...]
    params: dict[str, int]
    full_rank: tuple[str, ...] = ()
    leaf_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def matrix_params(self) -> int:
        """Number of parameters labelled `"matrix"`."""
        return self.params.get("matrix", 0)

    @property
    def total_params(self) -> int:
        """Number of parameters."""
        return sum(self.params.values())

    @property
    def matrix_bytes(self) -> int:
        """Bytes of state held for the matrices."""
        return sum(row.bytes for row in self.rows if row.label == "matrix")

    @property
    def total_bytes(self) -> int:
        """Bytes of the state."""
        return sum(row.bytes for row in self.rows)

    @property
    def device_bytes(self) -> int:
        """Bytes of the state that one device holds; all if there is but one."""
        held = ((row.bytes, row.device_bytes) for row in self.rows)
        return sum(total if part is None else part for total, part in held)

    @property
    def fp32_muon_bytes(self) -> int:
        """Bytes float32 Muon holds for the matrices: one momentum."""
        return 4 * self.matrix_params

    @property
    def fp32_muon_adamw_bytes(self) -> int:
        """Bytes float32 Muon holds with float32 AdamW, two moments, for the rest."""
        return self.fp32_muon_bytes + 8 * (self.total_params - self.matrix_params)

    def to_dict(self) -> dict[str, Any]:
        """Returns the two comparisons as plain numbers; reductions are fractions."""
        matrix, total = self.matrix_bytes, self.total_bytes
        return {
            "matrix": {
                "params": self.matrix_params,
                "state_bytes": matrix,
                "fp32_muon_bytes": self.fp32_muon_bytes,
                "reduction": _reduction(matrix, self.fp32_muon_bytes),
            },
            "total": {
                "params": self.total_params,
                "state_bytes": total,
                "fp32_muon_adamw_bytes": self.fp32_muon_adamw_bytes,
                "reduction": _reduction(total, self.fp32_muon_adamw_bytes),
            },
        }


def memory_report(
    tx: optax.GradientTransformation,
    params: optax.Params,
    labels: Any = None,
) -> MemoryReport:
    """Counts the bytes of `tx`'s state for `params`, without allocating it.

    Example:
      >>> report = memory_report(momentum(), {"kernel": jnp.zeros((8, 16))})
      >>> report.rows
      (MemoryRow(label='matrix', field='momentum', dtype='float32', entries=128, bytes=512, device_bytes=None),)

    Args:
      tx: Transformation whose state to count.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s. If they are sharded over
        several devices, so is the state, as `state_sharding` has it.
      labels: Labels, as for `build_optimizer`; by default the labels that `tx` uses, or
        by names if not given. Frozen parameters are left out of the report.

    Returns:
      The report.
    """  # noqa: E501 (the row is printed on one line)
    params = as_arrays(params)
    roles = settle(params, labels=labels, refuse=False)
    if labels is None:  # `tx` may know better, of those that it is given
        roles |= record.recorded_init(tx, params)[1].roles
    label_of, counts = {name: role.label for name, role in roles.items()}, {}
    for path, x in jax.tree.leaves_with_path(params):
        label = label_of[keystr(path)]
        if label != "frozen":
            counts[label] = counts.get(label, 0) + x.size
    state = _placed_state(tx, params)
    places = locate(state, params)
    sums: dict[tuple[str, str, str], list[int]] = {}
    for path, node in jax.tree.leaves_with_path(state, is_leaf=is_quantized):
        place = places[keystr(path)]
        label = label_of[place.name] if place.name is not None else "other"
        field = place.fields[-1] if place.fields else ""
        stored = is_quantized(node)
        parts = {"": node.codes, ".scales": node.scales} if stored else {"": node}
        for suffix, x in parts.items():
            key = (label, field + suffix, x.dtype.name)
            counted = (x.size, x.size * x.dtype.itemsize, bytes_per_device(x))
            sums[key] = [a + b for a, b in zip(sums.get(key, (0,) * 3), counted)]  # noqa: B905
    spread = shardings_of(params) is not None
    rows = tuple(
        MemoryRow(*key, entries, size, here if spread else None)
        for key, (entries, size, here) in sums.items()
    )
    plain = owners.with_layout(state, {})
    places = locate(plain, params)
    full_rank = _full_rank(plain, places, label_of)
    return MemoryReport(rows, counts, full_rank, _leaf_bytes(plain, places))


def compiled_bytes(
    tx: optax.GradientTransformation, params: optax.Params
) -> dict[str, int]:
    """Compiles `tx.update`, its state donated, and returns the bytes planned for it.

    Args:
      tx: Transformation to compile, for gradients typed as the parameters.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      `temp_bytes` beyond arguments and results, `argument_bytes`, `output_bytes`.
    """
    state = jax.eval_shape(tx.init, params)

    # The state first: JAX pairs donated buffers with results of their shape in order,
    # and the updates have the shape of the momentum.
    def update(state: Any, grads: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return state, updates

    step = jax.jit(update, donate_argnums=0).lower(state, params, params)
    planned = planned_bytes(step.compile())
    return {k: planned[k] for k in ("temp_bytes", "argument_bytes", "output_bytes")}


def planned_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Returns the bytes that the compiler planned for a program, on each device.

    Args:
      compiled: A compiled program.

    Returns:
      `argument_bytes` and `output_bytes`; `alias_bytes` of outputs that are written
      over donated arguments; `temp_bytes` of what lives only while it runs; and
      `peak_bytes`, arguments and outputs, those in one place once, and temporaries.
    """
    plan: Any = compiled.memory_analysis()
    sizes = {
        name: int(getattr(plan, f"{name}_size_in_bytes"))
        for name in ("argument", "output", "alias", "temp")
    }
    peak = sum(sizes.values()) - 2 * sizes["alias"]
    return {f"{name}_bytes": size for name, size in sizes.items()} | {
        "peak_bytes": peak
    }


def _placed_state(tx: optax.GradientTransformation, params: optax.Params) -> Any:
    """Returns shapes and types of the state, with shardings if `params` have some."""
    state = record.abstract_init(tx, params)
    shardings = shardings_of(params)
    if shardings is None:
        return state
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        state,
        state_sharding(tx, params, shardings),
    )


def _leaf_bytes(state: optax.OptState, places: Mapping[str, Place]) -> dict[str, int]:
    """Returns the bytes of the state of each parameter."""
    sizes: dict[str, int] = {}
    for path, node in jax.tree.leaves_with_path(state, is_leaf=is_quantized):
        name = places[keystr(path)].name
        if name is not None:
            size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(node))
            sizes[name] = sizes.get(name, 0) + size
    return sizes


def _full_rank(
    state: optax.OptState, places: Mapping[str, Place], label_of: Mapping[str, str]
) -> tuple[str, ...]:
    """Returns the matrices that have no basis where others have one."""
    nodes = jax.tree.leaves_with_path(state, is_leaf=lambda node: node is None)
    found = [places[keystr(path)] for path, node in nodes if node is None]
    names = [place.name for place in found if place.field(["basis"])]
    # What has no label is absent from the parameters too.
    return tuple(name for name in names if name and label_of.get(name) == "matrix")


def _reduction(held: int, baseline: int) -> float:
    return 1 - held / baseline if baseline else 0.0
