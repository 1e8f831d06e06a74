"""Parts of a training step's memory, counted from shapes.

A compiler plans weights, state and temporaries as three sums; these are parts of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanochat_jax.codecs import is_quantized
from nanochat_jax.config import Config
from nanochat_jax.lm.planning.optimizer_summary import megabytes
from nanochat_jax.optimizer import MemoryReport, bytes_per_device, sum_dtype
from nanochat_jax.transforms import SplitMasterState

_LOW_BITS = "low_bits"  # the field of `SplitMasterState`


class StepParts(NamedTuple):
    """Parts of a training step's memory.

    Attributes:
      params: Number of parameters, not bytes.
      low_bits_bytes: Low bits of weights in two parts, on each device; in the state.
      kept_bytes: Hidden states that `update_in_backward` keeps for the backward pass;
        in the temporaries, 0 without it.
      gradient_bytes: Gradients that exist at a time: of one layer or table with
        `update_in_backward`, else of all parameters; in the temporaries.
      accumulator_bytes: Sums of gradients over microbatches, in float32; in the
        temporaries, 0 for one microbatch.
    """

    params: int
    low_bits_bytes: int
    kept_bytes: int
    gradient_bytes: int
    accumulator_bytes: int


def step_parts(config: Config, params: Any, opt_state: Any) -> StepParts:
    """Returns the parts of a training step's memory.

    Args:
      config: Settings of the run.
      params: Shapes and types of its parameters.
      opt_state: Shapes and types of the state of its optimizer.
    """
    return StepParts(
        params=sum(x.size for x in jax.tree.leaves(params)),
        low_bits_bytes=low_bits_bytes(opt_state),
        kept_bytes=kept_bytes(config),
        gradient_bytes=gradient_bytes(config, params),
        accumulator_bytes=accumulator_bytes(config, params),
    )


def parts_from_shapes(config: Config, params: Any, report: MemoryReport) -> StepParts:
    """Returns the parts of a training step's memory without its optimizer's state.

    Args:
      config: Settings of the run.
      params: Shapes and types of its parameters.
      report: Memory of its optimizer.
    """
    found = [row.bytes for row in report.rows if row.field == _LOW_BITS]
    return step_parts(config, params, ())._replace(low_bits_bytes=sum(found))


def part_lines(
    config: Config,
    parts: StepParts,
    params_bytes: int,
    state_bytes: int,
    temp_bytes: int | None = None,
) -> list[str]:
    """Returns lines about the parts of a training step's memory that are not empty.

    Args:
      config: Settings of the run.
      parts: The parts.
      params_bytes: Bytes of the weights.
      state_bytes: Bytes of the optimizer state.
      temp_bytes: Bytes of all temporaries, if a compiler has planned them.
    """
    one = " of one layer or table" if config.update_in_backward else ""
    other = "other " if parts.low_bits_bytes else ""
    sizes = {
        "    weights": params_bytes,
        "    low bits of the weights": parts.low_bits_bytes,
        f"    {other}optimizer state": state_bytes - parts.low_bits_bytes,
        "    temporaries, in part": temp_bytes,
        "      hidden states kept for the backward pass": parts.kept_bytes,
        f"      gradients{one}": parts.gradient_bytes,
        f"      their sums over microbatches{one}": parts.accumulator_bytes,
    }
    told = {"    temporaries, in part": ":"} if temp_bytes is None else {}
    return [
        f"{name}{told[name]}" if name in told else f"{name} {megabytes(size or 0)}"
        for name, size in sizes.items()
        if size or name in told
    ]


def low_bits_bytes(opt_state: Any) -> int:
    """Returns the bytes of the low bits of weights on each device.

    Args:
      opt_state: Shapes and types of the state of an optimizer.
    """
    is_split = lambda node: isinstance(node, SplitMasterState)
    leaf = lambda node: is_split(node) or is_quantized(node)
    nodes = jax.tree.leaves(opt_state, is_leaf=leaf)
    return sum(bytes_per_device(node.low_bits) for node in nodes if is_split(node))


def kept_bytes(config: Config) -> int:
    """Returns the bytes of hidden states that `update_in_backward` keeps.

    Of A microbatches of B sequences of S tokens these are `[A, B, S, D]` before each
    segment of layers, and before each layer of one segment.

    Args:
      config: Settings of the run.
    """
    if not config.update_in_backward:
        return 0
    kept = config.n_layers // config.remat_segment
    if config.remat_segment > 1:
        kept += config.remat_segment
    width = jnp.dtype(config.compute_dtype).itemsize
    return kept * config.tokens_per_step * config.dim * width


def gradient_bytes(config: Config, params: Any) -> int:
    """Returns the bytes of the gradients that exist at a time.

    Args:
      config: Settings of the run.
      params: Shapes and types of its parameters.
    """
    size = lambda x: x.size * x.dtype.itemsize
    if not config.update_in_backward:
        return _total(params, size)
    layer, rest = _layer_and_rest(config, params, size)
    # A tied table has a gradient from the head on, to which the embedding adds.
    kept = size(params["embed"]["embedding"]) if config.weight_tied else 0
    return max(layer + kept, rest)


def accumulator_bytes(config: Config, params: Any) -> int:
    """Returns the bytes in which gradients are added up over microbatches.

    Args:
      config: Settings of the run.
      params: Shapes and types of its parameters.
    """
    if config.grad_accum_steps == 1:
        return 0
    size = lambda x: x.size * sum_dtype(x).itemsize
    if not config.update_in_backward:
        return _total(params, size)
    return max(_layer_and_rest(config, params, size))


def _total(tree: Any, size: Callable[[Any], int]) -> int:
    return sum(size(x) for x in jax.tree.leaves(tree))


def _layer_and_rest(
    config: Config, params: Any, size: Callable[[Any], int]
) -> tuple[int, int]:
    """Returns the bytes of a layer of the stack, and of what is updated beside it."""
    totals = {key: _total(part, size) for key, part in params.items()}
    layer, embedding = totals.pop("blocks") // config.n_layers, totals.pop("embed")
    head = sum(totals.values())
    rest = head + embedding if config.weight_tied else max(head, embedding)
    return layer, rest
