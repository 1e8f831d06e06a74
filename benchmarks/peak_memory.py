"""Peak resident memory of training on the CPU, beside what was planned for it.

    python benchmarks/peak_memory.py --config-file configs/nano_125m.toml

Each row is a process of its own: it compiles the training step, allocates the state and
takes a few steps. The system's mark of the most resident memory, `VmHWM`, is reset once
the step is compiled and planned, with what the compiler freed given back, so what is
measured is the rise above that: parameters, state, batch and what the step uses beside.

  imports   resident after importing everything
  compiled  resident after compiling, with nothing allocated and freed memory given back
  init      rise while the initial state is made
  steps     rise while steps are taken
  peak      the larger of these two, to be compared with what was planned
  process   most resident memory of the process from start to end, `ru_maxrss`, and over
            what `nanochat-jax plan` says of it

Linux only, since the mark is reset through `/proc`.
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

import common
import jax
import jax.numpy as jnp

from nanochat_jax.commands.launch import bound_arenas
from nanochat_jax.config import Config
from nanochat_jax.lm.planning import run_memory
from nanochat_jax.lm.training.step import compile_train_step, init_state

VARIANTS = {
    "muon": {},
    "muon_8bit": {"use_8bit_optim": True},
    "galore_8bit": {"use_8bit_optim": True, "use_galore": True},
    "muon, full logits": {"loss_chunk": 0},
    "muon, scan and remat": {"scan_layers": True, "remat": True},
}


class Memory:
    """Resident memory of this process, in bytes."""

    @staticmethod
    def now():
        return Memory._read("VmRSS")

    @staticmethod
    def most():
        return Memory._read("VmHWM")

    @staticmethod
    def forget():
        """Resets the mark of the most."""
        Path("/proc/self/clear_refs").write_text("5")

    @staticmethod
    def _read(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        [line] = [line for line in lines if line.startswith(f"{key}:")]
        return 1024 * int(line.split()[1])


def measure(config, steps):
    """Returns what one run takes; to be called in a fresh process."""
    row = {"imports": Memory.now()}
    run = run_memory.abstract_run(config)
    step = compile_train_step(run)
    planned = run_memory.plan_run(run, step)
    row |= {"planned": planned._asdict(), "compiling": Memory.most()}
    Memory.forget()
    row["compiled"] = base = Memory.now()
    state = jax.block_until_ready(init_state(run))
    row["init"] = Memory.most() - base
    run_memory.give_back_memory()  # as the command line does
    shape = (config.grad_accum_steps, config.batch_size, config.sequence + 1)
    Memory.forget()
    for _ in range(steps):
        state, metrics = step(state, jnp.zeros(shape, jnp.int32))
        jax.block_until_ready(metrics)
    row["steps"] = Memory.most() - base
    row["peak"] = max(row["init"], row["steps"])
    row["ratio"] = row["peak"] / planned.peak_bytes
    row["process"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resident = planned.process_bytes + planned.peak_bytes
    row["process_ratio"] = row["process"] / resident
    return row


def in_process(args, name):
    """Returns `measure` for a variant, in a process of its own."""
    command = [sys.executable, __file__, "--child", name, *args]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", default="configs/nano_125m.toml")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = dataclasses.replace(
        Config.from_toml(args.config_file),
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        grad_accum_steps=1,
    )
    jax.config.update("jax_platforms", "cpu")
    bound_arenas()  # as the command line does
    if args.child:
        config = dataclasses.replace(config, **VARIANTS[args.child])
        print(json.dumps(measure(config, args.steps)))
        return
    flags = ["config-file", "batch-size", "seq-len", "steps"]
    words = [f"--{name}={getattr(args, name.replace('-', '_'))}" for name in flags]
    rows = [{"variant": name, **in_process(words, name)} for name in args.only]
    result = {
        "config": args.config_file,
        "tokens": config.tokens_per_step,
        "machine": common.machine(),
        "rows": rows,
    }
    common.write(args.output, result)
    print(result["machine"])
    common.show(
        f"Peak memory of a step of {config.tokens_per_step} tokens, "
        f"{args.config_file}, in MB",
        [
            {
                "variant": row["variant"],
                "planned": _megabytes(row["planned"]["peak_bytes"]),
                "peak": _megabytes(row["peak"]),
                "ratio": f"{row['ratio']:.3f}",
                **{
                    key: _megabytes(row[key])
                    for key in ("init", "steps", "imports", "compiled", "process")
                },
                "of plan": f"{row['process_ratio']:.3f}",
            }
            for row in rows
        ],
    )


def _megabytes(count):
    return f"{count / 1e6:,.0f}"


if __name__ == "__main__":
    main()
