"""Memory of a run, from the plans of its compiled programs; nothing is allocated."""

import ctypes
import gc
import sys
from typing import Any, NamedTuple

import jax

from nanochat_jax.config import Config
from nanochat_jax.lm.model import build_optimizer, gpt
from nanochat_jax.lm.planning.optimizer_summary import megabytes
from nanochat_jax.lm.planning.step_parts import (
    StepParts,
    accumulator_bytes as accumulator_bytes,
    part_lines,
    step_parts,
)
from nanochat_jax.lm.runtime import memory_in_use, tree_bytes
from nanochat_jax.lm.training import Run
from nanochat_jax.optimizer import bytes_per_device, planned_bytes


class RunPlan(NamedTuple):
    """Bytes of a run on each of its devices, on disk, and of its process.

    Attributes:
      devices: Number of devices.
      params_bytes: Parameters.
      opt_state_bytes: State of the optimizer.
      batch_bytes: Batch of token ids.
      temp_bytes: Temporaries of a step: activations, gradients, logits.
      step_bytes: Peak of a step: its arguments, outputs that are not written over
        them, and temporaries.
      init_bytes: Peak while the initial state is made.
      peak_bytes: The larger of these two.
      checkpoint_bytes: State in a checkpoint, on all devices together and before
        compression, which does little to trained floats.
      process_bytes: On the CPU, resident memory of the process after compiling, with
        nothing allocated: Python, libraries and compiled code. Training comes on top of
        it. `None` on other devices.
      parts: Parts of the step's memory, from shapes.
    """

    devices: int
    params_bytes: int
    opt_state_bytes: int
    batch_bytes: int
    temp_bytes: int
    step_bytes: int
    init_bytes: int
    peak_bytes: int
    checkpoint_bytes: int
    process_bytes: int | None
    parts: StepParts

    def to_dict(self) -> dict[str, int | None]:
        """Returns the plan as plain numbers, without the parts of the step."""
        numbers = self._asdict()
        del numbers["parts"]
        return numbers


def abstract_run(config: Config) -> Run:
    """Returns a run with model and optimizer, but without data.

    Args:
      config: Its settings.
    """
    graphdef, params = gpt.abstract_model(config)
    absent: Any = None
    tx = build_optimizer(config, params)
    return Run(config, graphdef, params, tx, absent, absent)


def plan_run(run: Run, step: jax.stages.Compiled) -> RunPlan:
    """Returns the memory that a run takes.

    Args:
      run: The run; its data is not looked at.
      step: Its compiled step, from `compile_train_step`.
    """
    planned = planned_bytes(step)
    state, batch = _arguments(step)
    init_bytes = _init_bytes(run)
    give_back_memory()
    return RunPlan(
        devices=len(jax.tree.leaves(state)[0].sharding.device_set),
        params_bytes=bytes_per_device(state.params),
        opt_state_bytes=bytes_per_device(state.opt_state),
        batch_bytes=bytes_per_device(batch),
        temp_bytes=planned["temp_bytes"],
        step_bytes=planned["peak_bytes"],
        init_bytes=init_bytes,
        peak_bytes=max(planned["peak_bytes"], init_bytes),
        checkpoint_bytes=tree_bytes(state),
        process_bytes=memory_in_use() if jax.default_backend() == "cpu" else None,
        parts=step_parts(run.config, state.params, state.opt_state),
    )


def step_bytes(plan: RunPlan) -> dict[str, int]:
    """Returns the memory of a step alone, on each device.

    Args:
      plan: Memory of the run.
    """
    return {
        "weights_bytes": plan.params_bytes,
        "state_bytes": plan.opt_state_bytes,
        "temp_bytes": plan.temp_bytes,
        "peak_bytes": plan.step_bytes,
    }


def plan_summary(config: Config, plan: RunPlan) -> str:
    """Returns in words what a run takes on a device, and its checkpoints on disk.

    Args:
      config: Settings of the run.
      plan: Its memory.
    """
    held = plan.params_bytes + plan.opt_state_bytes
    where = "" if plan.devices == 1 else f" on each of {plan.devices} devices"
    lines = [
        f"Peak memory: {megabytes(plan.peak_bytes)}{where}",
        f"  a compiled step of {config.tokens_per_step:,} tokens "
        f"{megabytes(plan.step_bytes)}:",
        *part_lines(
            config, plan.parts, plan.params_bytes, plan.opt_state_bytes, plan.temp_bytes
        ),
        f"    in all {plan.step_bytes / plan.parts.params:.2f} bytes a parameter, "
        f"weights and state {held / plan.parts.params:.2f} bytes a parameter",
        f"  making the initial state {megabytes(plan.init_bytes)}",
    ]
    if plan.process_bytes is not None:
        resident = plan.process_bytes + plan.peak_bytes
        lines.append(
            f"  resident memory about {megabytes(resident)}, with "
            f"{megabytes(plan.process_bytes)} of Python, libraries and code"
        )
    # A checkpoint is deleted once the one that takes its place is whole.
    most = config.keep_last_checkpoints + 1
    kept = " beside those kept for good" if config.keep_checkpoint_every else ""
    lines.append(
        f"Checkpoint: up to {megabytes(plan.checkpoint_bytes)}, at most {most} of them "
        f"on disk{kept}: {megabytes(most * plan.checkpoint_bytes)}"
    )
    return "\n".join(lines)


def give_back_memory() -> None:
    """Gives memory that this process has freed back to the system, where it can be.

    Compilers free hundreds of megabytes, which the C library of Linux keeps otherwise.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _arguments(step: jax.stages.Compiled) -> Any:
    """Returns state and batch of a compiled step, with their shardings."""
    avals, shardings = step.in_avals[0], step.input_shardings[0]
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(place, avals, shardings)


def _init_bytes(run: Run) -> int:
    """Returns the peak of `init_state`: parameters first, then the state."""
    init = jax.jit(lambda: gpt.init(run.config, run.config.seed)[1])
    first = planned_bytes(init.lower().compile())
    second = planned_bytes(jax.jit(run.tx.init).lower(run.params).compile())
    # Unused parameters are not arguments of the program but stay allocated.
    beside = tree_bytes(run.params) - second["argument_bytes"]
    return max(first["peak_bytes"], beside + second["peak_bytes"])
