"""Tokens per second of a whole training step, by optimizer variant.

    python benchmarks/train_step.py --config-file configs/nano_125m.toml
    python benchmarks/train_step.py --model 1b --repeats 2 --only \
      "muon_8bit, scan and remat" "muon_8bit, in backward"

One model and batch; the variants' compiled steps, and those of Optax's optimizers, are
called in turn in one process, which holds the weights and state of each. Ratios are
those to the first row. Steps on which GaLore changes its basis are left out:
`benchmarks/refresh.py` times it.
"""

import argparse
import dataclasses
import gc

import common
import jax
import jax.numpy as jnp
import optax

from nanochat_jax import label_params
from nanochat_jax.config import Config
from nanochat_jax.lm.model import gpt
from nanochat_jax.lm.training.run import Run
from nanochat_jax.lm.training.step import compile_train_step, init_state
from nanochat_jax.optimizer import build_optimizer
from nanochat_jax.optimizer.baselines import build_adamw
from nanochat_jax.polynomials import METHODS, default_steps

BOTH = {"use_8bit_optim": True, "use_galore": True}
POLES = {"ns_method": "zolotarev", "ns_steps": 2}
EIGHT, SCANNED = {"use_8bit_optim": True}, {"scan_layers": True}
VARIANTS = {
    "muon": {},
    "muon_8bit": EIGHT,
    "muon_8bit, zolotarev": {**EIGHT, **POLES},
    "muon_8bit, scan and remat": {**EIGHT, **SCANNED, "remat": True},
    "muon_8bit, in backward": {**EIGHT, **SCANNED, "update_in_backward": True},
    "muon_8bit, in backward, bf16": {
        **EIGHT,
        **SCANNED,
        "update_in_backward": True,
        "param_dtype": "bfloat16",
    },
    "galore": {"use_galore": True},
    "galore_8bit": BOTH,
    "galore_plain": {"use_galore": True, "galore_residual": 0.0},
    "galore_plain_8bit": {**BOTH, "galore_residual": 0.0},
}


def optax_muon(config, params):
    """Builds Optax's Muon for the matrices, and AdamW for the rest."""
    adamw = optax.adamw(config.lr)
    muon = common.optax_muon(config.lr, config.muon_momentum)
    by_label = {"embedding": adamw, "head": adamw, "vector": adamw, "matrix": muon}
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip),
        optax.partition(by_label, label_params(params)),
    )


PEERS = {"optax.contrib.muon": optax_muon, "optax.adamw": build_adamw}


class Step:
    """A compiled training step with its own state, called again and again."""

    def __init__(self, config, build=build_optimizer):
        graphdef, params = gpt.abstract_model(config)
        tx = build(config, params)
        run = Run(config, graphdef, params, tx, None, None)
        self.step = compile_train_step(run)
        self.state = init_state(run)
        shape = (config.grad_accum_steps, config.batch_size, config.sequence + 1)
        self.batch = jax.random.randint(
            jax.random.key(0), shape, 0, config.vocab_size, jnp.int32
        )
        self.peak_bytes = self.step.memory_analysis().temp_size_in_bytes

    def __call__(self):
        self.state, metrics = self.step(self.state, self.batch)
        return metrics


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", default="configs/tiny_cpu.toml")
    parser.add_argument("--model", choices=("1b", "7b"), help="in place of a file")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument(
        "--rank", type=int, help="GaLore rank; a quarter of dim if unset"
    )
    parser.add_argument("--ns-dtype", default="auto")
    parser.add_argument("--ns-method", choices=METHODS, default="quintic")
    parser.add_argument("--compute-dtype", default="float32")
    parser.add_argument("--scan-layers", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    names = [*VARIANTS, *PEERS]
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--output", help="JSON file to write")
    return parser.parse_args()


def main():
    args = arguments()
    config = dataclasses.replace(
        Config.from_values({"model": args.model}, "--model")
        if args.model
        else Config.from_toml(args.config_file),
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        grad_accum_steps=1,
        ns_dtype=args.ns_dtype,
        ns_method=args.ns_method,
        ns_steps=default_steps(args.ns_method),
        compute_dtype=args.compute_dtype,
        scan_layers=args.scan_layers,
    )
    config = dataclasses.replace(config, galore_rank=args.rank or config.dim // 4)
    steps = {
        name: Step(dataclasses.replace(config, **settings))
        for name, settings in VARIANTS.items()
        if name in args.only
    }
    steps |= {name: Step(config, PEERS[name]) for name in PEERS if name in args.only}
    gc.collect()
    seconds = common.interleave(steps, args.repeats)
    first = next(iter(steps))
    rows = [
        {
            "variant": name,
            "tokens_per_s": config.tokens_per_step / common.median(seconds[name]),
            "ratio": common.ratio(seconds[first], seconds[name]),
            "temp_bytes": step.peak_bytes,
        }
        for name, step in steps.items()
    ]
    result = {
        "tokens": config.tokens_per_step,
        "settings": vars(args),
        "machine": common.machine(),
        "rows": rows,
    }
    common.write(args.output, result)
    print(result["machine"])
    name = args.model or args.config_file
    common.show(
        f"A training step of {config.tokens_per_step} tokens, {name}",
        [
            {
                "variant": row["variant"],
                "tokens/s": f"{row['tokens_per_s']:.0f}",
                f"of {first}": f"{row['ratio']:.3f}",
                "temp MB": f"{row['temp_bytes'] / 1e6:.0f}",
            }
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
