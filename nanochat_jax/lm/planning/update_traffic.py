"""Collectives of an update of the matrices, from shapes.

Sizes are as in `hlo_collectives.Collective`, on one device. Of a matrix `short x long`
the shorter axis is divided over S devices and the longer one over T, its rank is r:

  * Newton-Schulz: an all-to-all of a stack of matrices in the type of the iteration
    there and one back, zero matrices that fill the stack among them; replicas over
    `data` share the work if there is enough, and gather the results;
  * owners, with GaLore: the same of gradients and updates, all matrices of a shape in
    one stack. Bases, momentum and Newton-Schulz send nothing then.

With `update_in_backward` no matrix has an owner, and GaLore sends what Muon does, for
`r x long` or with residual for whole matrices, and besides

  * low rank, in float32: over S a reduce-scatter of `PᵀG`, `[r, long / T]`, and an
    all-gather of what comes back of it; over T an all-gather of the basis,
    `[short / S, r]`;
  * change of basis, in float32, once in `galore_update_freq` steps: over S an
    all-to-all of the gradient, so that each device has all of the shorter axis, and an
    all-gather of the momentum; over all devices an all-reduce of `[short, r]` for each
    product, and one of `[r, r]`.

Left out is quantised momentum whose blocks, which share a scale, are each on several
devices: these send each other some of it to store and to read it.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from nanochat_jax.config import Config
from nanochat_jax.lm.model import Params, label_params
from nanochat_jax.lm.planning.step_traffic import Traffic
from nanochat_jax.numerics import POWER_ITERATIONS
from nanochat_jax.optimizer import newton_schulz_flops, rank_of
from nanochat_jax.transforms import (
    Placement,
    group_by_shape,
    group_bytes,
    plan,
    specs,
)


class Matrices(NamedTuple):
    """A parameter of matrices.

    Attributes:
      whole: Its shape, type and sharding.
      low: Shape, type and sharding of its projected gradient; `None` without one.
    """

    whole: Any
    low: Any


class Stack(NamedTuple):
    """A stack of matrices whose iteration devices share.

    Attributes:
      what: Name of the data that is sent.
      sent: Shape of one, as it is sent.
      shape: Shape of one, as it is iterated on.
      size: Number of matrices, with the zero matrices that fill the stack.
      inside: Number of devices over which each matrix is divided.
      replicas: Number of such device groups sharing the stack.
    """

    what: str
    sent: tuple[int, ...]
    shape: tuple[int, ...]
    size: int
    inside: int
    replicas: int


def update_traffic(config: Config, params: Params) -> list[Traffic]:
    """Returns the collectives of an update of the matrices.

    Args:
      config: Settings of the run.
      params: Shapes and types of the parameters, from `param_sharding.place`.
    """
    _, rest = _by_owners(config, params)
    # "auto" is bfloat16 on any device of which one takes several.
    width = 2 if config.iteration_dtype in ("auto", "bfloat16") else 4
    rows = [
        row for stack in stacks(config, params) for row in _shared_out(stack, width)
    ]
    for x in rest:
        if x.low is not None:
            rows += [*_projected(x), *_based(x, config.galore_update_freq)]
    sums: dict[tuple, Traffic] = {}
    for row in rows:
        key = (row.what, row.kind, row.devices, row.every)
        old = sums.get(key, row._replace(count=0, bytes=0))
        sums[key] = old._replace(
            count=old.count + row.count, bytes=old.bytes + row.bytes
        )
    return [row for row in sums.values() if row.devices > 1 and row.bytes]


def busiest_flops(config: Config, params: Params) -> int:
    """Returns the operations of Newton-Schulz on the device that has the most of them.

    Args:
      config: Settings of the run.
      params: Shapes and types of the parameters, from `param_sharding.place`.
    """
    return sum(
        newton_schulz_flops(
            config, (stack.size // (stack.inside * stack.replicas), *stack.shape)
        )
        for stack in stacks(config, params)
    )


def stacks(config: Config, params: Params) -> Iterator[Stack]:
    """Yields the stacks of matrices, as `owned` makes them, or `orthogonalize`."""
    owned, matrices = _by_owners(config, params)
    yield from owned
    if not matrices:
        return
    devices = matrices[0].whole.sharding.mesh.size
    wholes = [x.whole for x in matrices]
    for outer in group_by_shape(wholes, group_bytes(), devices=devices):
        leaves = [_iterated(config, matrices[i]) for i in outer]
        places = [x.sharding for x in leaves]
        for inner in group_by_shape(leaves, group_bytes(), places, devices):
            first = leaves[inner[0]]
            count = len(inner) * math.prod(first.shape[:-2])
            inside, replicas = _shares(first, count)
            filled = count + -count % (inside * replicas)
            shape = first.shape[-2:]
            yield Stack("Newton-Schulz", shape, shape, filled, inside, replicas)


def _by_owners(config: Config, params: Params) -> tuple[list[Stack], list[Matrices]]:
    """Returns the stacks of matrices that have owners, and the other matrices."""
    matrices = _matrices(config, params)
    if not config.use_galore or config.update_in_backward:
        return [], matrices
    by_name = {f"[{i}]": x for i, x in enumerate(matrices)}
    wholes = [x.whole for x in matrices]
    placed = plan(wholes, Placement.of(wholes, [x.sharding for x in wholes]))
    owned = []
    for stack, route in placed:
        first = by_name[stack.members[0]]
        inside = specs.ways(first.whole.sharding, (*route.rows, *route.columns))
        sent, shape = (x.shape[-2:] for x in (first.whole, _iterated(config, first)))
        replicas = route.devices // inside
        owned.append(Stack("owners", sent, shape, stack.size, inside, replicas))
        for name in stack.members:
            del by_name[name]
    return owned, [*by_name.values()]


def _iterated(config: Config, x: Matrices) -> Any:
    """Returns the matrices that Newton-Schulz iterates on."""
    return x.whole if x.low is None or config.galore_residual else x.low


def _matrices(config: Config, params: Params) -> list[Matrices]:
    def with_low(x: Any) -> Matrices:
        rank = rank_of(config, x.shape)
        if rank is None:
            return Matrices(x, None)
        shape = (*x.shape[:-2], rank, max(x.shape[-2:]))
        where = specs.derived(shape, x.shape, x.sharding)
        return Matrices(x, jax.ShapeDtypeStruct(shape, "float32", sharding=where))

    leaves = zip(*map(jax.tree.leaves, (params, label_params(params))), strict=True)
    return [with_low(x) for x, label in leaves if label == "matrix"]


def _shares(x: Any, count: int) -> tuple[int, int]:
    """Returns the number of devices dividing a matrix, and of replicas that help."""
    used = _axes(x.sharding, x.ndim)
    inside, replicas = specs.ways(x.sharding, [*used]), 1
    for axis, size in x.sharding.mesh.shape.items():
        if axis not in used and inside * replicas * size <= count:
            replicas *= size
    return inside, replicas


def _shared_out(stack: Stack, width: int) -> Iterator[Traffic]:
    size = width * stack.size * math.prod(stack.sent) // stack.inside
    both = 2 * size // stack.replicas
    yield Traffic(stack.what, "all-to-all", 2, both, stack.inside)
    yield Traffic(stack.what, "all-gather", 1, size, stack.replicas)


def _projected(x: Matrices) -> Iterator[Traffic]:
    """Yields the collectives of projecting a gradient, and of projecting back."""
    what, (s, t, size) = "low rank", _divided(x)
    basis = Traffic(what, "all-gather", 1, size.basis // s, t)
    if _short_axes(x) <= _axes(x.low.sharding, x.low.ndim):
        yield Traffic(what, "reduce-scatter", 1, size.low // t, s)
        yield Traffic(what, "all-gather", 1, size.low // t, s)
    else:
        yield Traffic(what, "all-reduce", 1, size.low // t, s)
    yield basis


def _based(x: Matrices, every: int) -> Iterator[Traffic]:
    """Yields the collectives of a new basis, and of moving momentum to it."""
    what, (s, t, size) = "change of basis", _divided(x)
    products, rotation = POWER_ITERATIONS * size.basis, size.rotation
    sums = POWER_ITERATIONS + 1
    yield Traffic(what, "all-to-all", 1, size.whole // (s * t), s, every)
    yield Traffic(what, "all-reduce", sums, products + rotation, s * t, every)
    yield Traffic(what, "all-gather", 1, size.low // t, s, every)


class _Sizes(NamedTuple):
    """Float32 bytes of matrices before division over devices."""

    whole: int
    low: int
    basis: int
    rotation: int


def _divided(x: Matrices) -> tuple[int, int, _Sizes]:
    """Returns S, T and the bytes of the matrices before division."""
    *batch, r, long = x.low.shape
    short, sharding = min(x.whole.shape[-2:]), x.whole.sharding
    axes = specs.axes_of(sharding, x.whole.ndim)
    count = math.prod(batch)
    for names in axes[:-2]:
        count //= specs.ways(sharding, names)
    s, t = (specs.ways(sharding, names) for names in axes[-2:])
    if x.whole.shape[-2] > x.whole.shape[-1]:
        s, t = t, s
    bytes_of = lambda a, b: 4 * count * a * b
    whole, low = bytes_of(short, long), bytes_of(r, long)
    return s, t, _Sizes(whole, low, bytes_of(short, r), bytes_of(r, r))


def _short_axes(x: Matrices) -> set[str]:
    rows, columns = specs.axes_of(x.whole.sharding, x.whole.ndim)[-2:]
    return {*(rows if x.whole.shape[-2] <= x.whole.shape[-1] else columns)}


def _axes(sharding: Any, ndim: int) -> set[str]:
    return {name for axes in specs.axes_of(sharding, ndim) for name in axes}
