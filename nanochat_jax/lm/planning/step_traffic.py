"""Collectives of loss and gradient in a training step, from shapes.

`hlo_collectives.sent_bytes` gives the bytes sent for a size. The sizes on one device,
for A microbatches of B sequences, S tokens, a residual stream of D, L layers,
activations and kernels in `compute_dtype`:

  * parameters, over `fsdp`: an all-gather of each kernel wherever it is used, twice in
    blocks that are run in a loop or recomputed, else once;
  * gradients, over `fsdp`: a reduce-scatter of each kernel; for the head one in
    each chunk of the loss;
  * gradients, over `data`: an all-reduce of the part on a device;
  * embedding, over `fsdp`: an all-to-all of the table from rows to columns, and one of
    its gradient back, both in the table's own type, as is its gradient over `data`;
  * tokens, over `fsdp`: an all-to-all of `[B, S, D]` from the columns looked up to
    sequences, and one of its gradient back;
  * activations, over `tensor`: an all-reduce of `[B, S, D]` for each kernel whose sum
    runs over the divided axis, two forward and five backward in a block, and one for
    the head.

`update_traffic.py` has the optimizer. Left out are scalars, vectors, norms
and indices.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.config import Config
from nanochat_jax.lm.model import Params, label_params
from nanochat_jax.lm.planning.hlo_collectives import sent_bytes
from nanochat_jax.optimizer import bytes_per_device
from nanochat_jax.transforms import specs


class Traffic(NamedTuple):
    """All collectives of one kind and purpose in a step, summed.

    Attributes:
      what: Name of the data.
      kind: One of `hlo_collectives.KINDS`.
      count: Number of them.
      bytes: Bytes of operands or of results on one device, whichever are larger.
      devices: Devices that take part in each together.
      every: Steps from one to the next.
    """

    what: str
    kind: str
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    bytes: int
    devices: int
    every: int = 1

    @property
    def sent_bytes(self) -> int:
        """Bytes that one device sends in such a step."""
        return sent_bytes(self.kind, self.bytes, self.devices)


def step_traffic(config: Config, params: Params) -> list[Traffic]:
    """Returns the collectives of loss and gradients of a step.

    Args:
      config: Settings of the run.
      params: Shapes and types of the parameters, from `param_sharding.place`.
    """
    sharding = jax.tree.leaves(params)[0].sharding
    data, fsdp, tensor = (sharding.mesh.shape[a] for a in ("data", "fsdp", "tensor"))
    parts = data * fsdp
    stream = config.batch_size // parts * config.sequence * config.dim
    width, times = jnp.dtype(config.compute_dtype).itemsize, config.grad_accum_steps
    gathered, reduced, left = _kernels(config, params)
    embedding: Any = params["embed"]["embedding"]
    by_rows = "fsdp" in specs.axes_of(embedding.sharding, 2)[0]
    table = by_rows * bytes_per_device(embedding)
    # One for each kernel whose inputs or outputs are divided, and one for the head.
    sums = 7 * config.n_layers + 1
    rows = [
        Traffic("parameters", "all-gather", *gathered, fsdp),
        Traffic("gradients", "reduce-scatter", *reduced, fsdp),
        Traffic("gradients", "all-reduce", *left, data),
        Traffic("embedding", "all-to-all", 2, 2 * table, fsdp),
        Traffic("tokens", "all-to-all", 2, 2 * width * stream, fsdp),
        Traffic("activations", "all-reduce", sums, sums * width * stream, tensor),
    ]
    return [
        row._replace(count=times * row.count, bytes=times * row.bytes)
        for row in rows
        if row.devices > 1 and row.bytes
    ]


def _kernels(config: Config, params: Params) -> list[tuple[int, int]]:
    """Returns what a device gathers, reduces over `fsdp`, and over `data`.

    Each as a number of kernels and their bytes; each pass of a loop counts.
    """
    width = jnp.dtype(config.compute_dtype).itemsize
    twice = 2 if config.scan_layers or config.remat else 1
    chunks = 1
    if config.loss_chunk:
        positions = max(1, config.loss_chunk // config.batch_size)
        chunks = -(-config.sequence // positions)
    gathered, reduced, left = np.zeros((3, 2), int)
    labels = jax.tree.leaves(label_params(params))
    for x, label in zip(jax.tree.leaves(params), labels, strict=True):
        count, here = (
            math.prod(x.shape[:-2]),
            math.prod(x.sharding.shard_shape(x.shape)),
        )
        # A table that is looked up in is not cast, so its gradient is not either.
        looked_up = label == "embedding"
        left += (count, here * (x.dtype.itemsize if looked_up else width))
        is_head = label == "head" or (label == "embedding" and config.weight_tied)
        used = {name for axes in specs.axes_of(x.sharding, x.ndim) for name in axes}
        if "fsdp" in used and (label == "matrix" or is_head):
            kernel = np.array((count, width * here * x.sharding.mesh.shape["fsdp"]))
            gathered += kernel if is_head else twice * kernel
            reduced += chunks * kernel if is_head else kernel
    return [(int(count), int(size)) for count, size in (gathered, reduced, left)]
