"""What devices send each other in a training step, reckoned from shapes.

A collective moves what `collectives.Collective.sent_bytes` says of its size. The sizes,
on one device, for A microbatches of B sequences, S tokens, a residual stream of D, L
layers, activations and kernels in `compute_dtype`:

  * parameters, over `fsdp`: an all-gather of each kernel wherever it is used, twice in
    blocks that are run in a loop or recomputed, else once;
  * gradients, over `fsdp`: a reduce-scatter of each kernel; that of the head once for
    each chunk of the loss;
  * gradients, over `data`: an all-reduce of what is then left on a device;
  * tokens, over `fsdp`: an all-to-all of `[B, S, D]` forward and one backward, as the
    columns of the embedding are divided;
  * activations, over `tensor`: an all-reduce of `[B, S, D]` for each kernel whose sum
    runs over the divided axis, two forward and five backward in a block, and one for
    the head;
  * Newton-Schulz, once a step: an all-to-all of all matrices in the type of the
    iteration there and one back, zero matrices that fill a stack among them; replicas
    over `data` share the work if there is enough, and gather the results.

Left out are scalars, vectors, norms and indices, and what `galore` sends to find its
bases and to project.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanochat_jax.config import Config
from nanochat_jax.labels import label_params
from nanochat_jax.lm.collectives import Collective
from nanochat_jax.lm.stacking import Params
from nanochat_jax.transforms import specs, trees


class Traffic(NamedTuple):
    """Collectives of one kind that do one thing, all of a step together.

    Attributes:
      what: What is sent.
      kind: One of `collectives.KINDS`.
      bytes: Bytes of operands or of results on one device, whichever are larger.
      devices: Devices that take part in each together.
    """

    what: str
    kind: str
    bytes: int
    devices: int

    @property
    def sent_bytes(self) -> int:
        """Bytes that one device sends."""
        return Collective(self.kind, self.bytes, self.devices, False).sent_bytes


def step_traffic(config: Config, params: Params) -> list[Traffic]:
    """Returns what devices send each other in a step.

    Args:
      config: Settings of the run.
      params: Shapes and types of the parameters, from `mesh.place`.
    """
    sharding = jax.tree.leaves(params)[0].sharding
    data, fsdp, tensor = (sharding.mesh.shape[a] for a in ("data", "fsdp", "tensor"))
    parts = data * fsdp
    stream = config.batch_size // parts * config.sequence * config.dim
    width, times = jnp.dtype(config.compute_dtype).itemsize, config.grad_accum_steps
    gathered, reduced, left = _kernel_entries(config, params)
    # One for each kernel whose inputs or outputs are divided, and one for the head.
    sums = 7 * config.n_layers + 1
    rows = [
        Traffic("parameters", "all-gather", times * width * gathered, fsdp),
        Traffic("gradients", "reduce-scatter", times * width * reduced, fsdp),
        Traffic("gradients", "all-reduce", times * width * left, data),
        Traffic("tokens", "all-to-all", times * width * 2 * stream, fsdp),
        Traffic("activations", "all-reduce", times * width * sums * stream, tensor),
        *_newton_schulz(config, params),
    ]
    return [row for row in rows if row.devices > 1 and row.bytes]


def _kernel_entries(config: Config, params: Params) -> tuple[int, int, int]:
    """Returns entries that a device gathers, reduces over `fsdp`, and over `data`."""
    twice = 2 if config.scan_layers or config.remat else 1
    chunks = 1
    if config.loss_chunk:
        positions = max(1, config.loss_chunk // config.batch_size)
        chunks = -(-config.sequence // positions)
    gathered = reduced = left = 0
    labels = jax.tree.leaves(label_params(params))
    for x, label in zip(jax.tree.leaves(params), labels, strict=True):
        here = math.prod(x.sharding.shard_shape(x.shape))
        used = {name for axes in specs.axes_of(x.sharding, x.ndim) for name in axes}
        whole = here * (x.sharding.mesh.shape["fsdp"] if "fsdp" in used else 1)
        is_head = label == "head" or (label == "embedding" and config.weight_tied)
        left += here
        if "fsdp" in used and (label == "matrix" or is_head):
            gathered += whole if is_head else twice * whole
            reduced += chunks * whole if is_head else whole
    return gathered, reduced, left


def _newton_schulz(config: Config, params: Params) -> list[Traffic]:
    """Returns what brings matrices to the devices that iterate on them, and back."""
    labels = jax.tree.leaves(label_params(params))
    pairs = zip(jax.tree.leaves(params), labels, strict=True)
    matrices = [x for x, label in pairs if label == "matrix"]
    width = 4 if config.ns_dtype == "float32" else 2
    sent: dict[tuple[str, int], int] = {}
    for stack in _stacks(matrices, matrices[0].sharding.mesh.size):
        count = sum(math.prod(x.shape[:-2]) for x in stack)
        inside, replicas = _shares(stack[0], count)
        filled = count + -count % (inside * replicas)
        size = width * filled * math.prod(stack[0].shape[-2:]) // inside
        for key, bytes_ in {
            ("all-to-all", inside): 2 * size // replicas,
            ("all-gather", replicas): size,
        }.items():
            sent[key] = sent.get(key, 0) + bytes_
    return [Traffic("Newton-Schulz", kind, x, n) for (kind, n), x in sent.items()]


def _shares(x: jax.ShapeDtypeStruct, count: int) -> tuple[int, int]:
    """Returns over how many devices matrices are divided, and helping replicas."""
    sharding: Any = x.sharding
    used = {name for axes in specs.axes_of(sharding, x.ndim) for name in axes}
    inside, replicas = specs.ways(sharding, [*used]), 1
    for axis, size in sharding.mesh.shape.items():
        if axis not in used and inside * replicas * size <= count:
            replicas *= size
    return inside, replicas


def _stacks(matrices: list[Any], devices: int) -> Iterator[list[Any]]:
    """Yields leaves that are stacked together, by `sequence` and then the iteration."""
    for outer in trees.group_by_shape(matrices, trees.GROUP_BYTES, devices=devices):
        leaves = [matrices[i] for i in outer]
        places = [x.sharding for x in leaves]
        half = trees.GROUP_BYTES // 2
        for inner in trees.group_by_shape(leaves, half, places, devices):
            yield [leaves[i] for i in inner]
