"""Tokens per second of our training step beside that of the same GPT in PyTorch.

    pip install torch
    python benchmarks/pytorch_gpt.py --sizes 3m mid

Equal weights, batch and float32, all cores of the machine. PyTorch trains the model of
`torch_gpt.py` with Muon and AdamW, eagerly and through `torch.compile`; Newton-Schulz
is in one type on both sides, and ours is timed with two poles too. All steps are called
in turn in one process, a few at a time, so that the threads one leaves spinning cost it
and not the next.
"""

import argparse
import dataclasses
import gc
import os
from importlib.metadata import version
from pathlib import Path

import common
import jax
import numpy as np
import torch
import torch_gpt
import train_step

from nanochat_jax.config import Config

CONFIGS = Path(__file__).parents[1] / "configs"
MID = Config(dim=512, n_layers=6, n_heads=8, vocab_size=8192, max_seq_len=256)
SIZES = {
    "3m": (Config.from_toml(CONFIGS / "compare_3m.toml"), 4, 128),
    "mid": (MID, 4, 256),
    "nano_125m": (Config.from_toml(CONFIGS / "nano_125m.toml"), 1, 256),
}
OURS, POLES = "nanochat_jax", "nanochat_jax, zolotarev"


def sized(name):
    """The settings of a size: full float32 Muon, one microbatch, no padding."""
    config, batch_size, seq_len = SIZES[name]
    return dataclasses.replace(
        config,
        batch_size=batch_size,
        seq_len=seq_len,
        grad_accum_steps=1,
        pad_vocab_to=1,
    )


def steps(config):
    """Our step and PyTorch's, from the same weights, on the same batch."""
    ours = train_step.Step(config)
    params = jax.tree.map(np.asarray, ours.state.params)
    batch = np.asarray(ours.batch[0])
    torch_step = lambda compiled: torch_gpt.Step(config, params, batch, compiled)
    poles = dataclasses.replace(config, ns_method="zolotarev", ns_steps=2)
    return {
        OURS: ours,
        POLES: train_step.Step(poles),
        "PyTorch, eager": torch_step(compiled=False),
        "PyTorch, compiled": torch_step(compiled=True),
    }


def repeated(step, times):
    def call():
        for _ in range(times):
            result = step()
        return result

    return call


def measure(name, repeats, times):
    """Rows of one size: tokens a second, and both of ours over each, turn by turn."""
    config, calls = sized(name), {}
    for variant, step in steps(config).items():
        calls[variant] = repeated(step, times)
        calls[variant]()  # compiles, and compiles again for what the first call left
    seconds = common.interleave(calls, repeats)
    tokens = times * config.tokens_per_step
    return [
        {
            "size": name,
            "variant": variant,
            "tokens_per_s": tokens / common.median(values),
            "ours_over_it": common.ratio(values, seconds[OURS]),
            "zolotarev_over_it": common.ratio(values, seconds[POLES]),
        }
        for variant, values in seconds.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["3m", "mid"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="steps of one turn")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    rows = []
    for name in args.sizes:
        rows += measure(name, args.repeats, args.steps)
        gc.collect()
        torch.compiler.reset()
    machine = common.machine()
    machine["versions"]["torch"] = version("torch")
    common.write(args.output, {"machine": machine, "rows": rows})
    print(machine)
    common.show(
        "A training step, float32, full Muon",
        [
            {
                "size": row["size"],
                "variant": row["variant"],
                "tokens/s": f"{row['tokens_per_s']:.0f}",
                "ours over it": f"{row['ours_over_it']:.3f}",
                "zolotarev over it": f"{row['zolotarev_over_it']:.3f}",
            }
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
