"""Trains real steps of a random 7B model, every layer updated in the backward pass.

    python benchmarks/seven_billion.py --variant both --rank 256 --seq-len 128
    python benchmarks/seven_billion.py --model 1b --variant 4bit --output step.json

Weights are bfloat16, rounded stochastically, and gradients one layer's. All steps
see one batch, so that the loss has to fall. The most resident memory of the process is
told beside what was planned for the step; Python and compiled code take half a gigabyte
of it. With 24 GB of memory nothing else may run. On a GPU the peak is the device's own.
"""

import argparse
import resource
import time
import tomllib
from pathlib import Path

import common
import jax
import jax.numpy as jnp

from nanochat_jax.config import Config
from nanochat_jax.lm.planning import run_memory
from nanochat_jax.lm.training import compile_train_step, init_state

VARIANTS = {
    "8bit": {"use_8bit_optim": True},
    "4bit": {"use_8bit_optim": True, "quant_bits": 4},
    "both": {"use_8bit_optim": True, "use_galore": True, "galore_residual": 0.0},
}


def main():
    args = _arguments()
    model = {"model": args.model}
    if args.config_file:
        model = tomllib.loads(Path(args.config_file).read_text())
    values = {
        **model,
        "batch_size": 1,
        "seq_len": args.seq_len,
        "param_dtype": "bfloat16",
        "update_in_backward": True,
        "lr": args.lr,
        **VARIANTS[args.variant],
    }
    if args.variant == "both":
        values["galore_rank"] = args.rank
    config = Config.from_values(values, "seven_billion.py")
    run = run_memory.abstract_run(config)
    start = time.perf_counter()
    step = compile_train_step(run)
    planned = run_memory.plan_run(run, step)
    size = sum(x.size for x in jax.tree.leaves(run.params))
    planned_bytes = run_memory.step_bytes(planned)
    print(common.machine())
    name = args.config_file or args.model
    print(f"{name}, {args.variant}: {size / 1e9:.3f} billion parameters")
    print(f"  compiled in {time.perf_counter() - start:.0f} s")
    for part, held in planned_bytes.items():
        print(f"  {part} {held / 1e9:.2f} GB planned")
    state = jax.block_until_ready(init_state(run))
    print(f"  state made, {_peak() / 1e9:.2f} GB at most", flush=True)
    shape = (1, 1, config.sequence + 1)
    batch = jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size)
    rows = []
    for i in range(args.steps):
        start = time.perf_counter()
        state, metrics = step(state, jnp.asarray(batch, jnp.int32))
        row = {
            "variant": args.variant,
            "step": i,
            "loss": float(metrics["loss"]),
            "seconds": time.perf_counter() - start,
            "most_bytes": _peak(),
            "planned_bytes": planned_bytes["peak_bytes"],
        }
        rows.append(row)
        print(
            f"  step {i}: loss {row['loss']:.3f}, {row['seconds']:.3g} s, "
            f"{row['most_bytes'] / 1e9:.2f} GB at most",
            flush=True,
        )
        result = {"model": name, "machine": common.machine(), "rows": rows}
        common.write(args.output, result)


def _peak() -> int:
    """Returns the most bytes so far: in use on a GPU, else resident."""
    stats = jax.devices()[0].memory_stats() or {}
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return stats.get("peak_bytes_in_use", resident)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="7b", choices=("1b", "7b", "70b"))
    parser.add_argument("--config-file", help="model of a TOML file, in place of these")
    parser.add_argument("--variant", default="both", choices=VARIANTS)
    parser.add_argument("--rank", type=int, default=1024, help="of GaLore")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens of the batch")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--output", help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
