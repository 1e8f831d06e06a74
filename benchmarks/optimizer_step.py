"""Times one optimizer step of every variant beside those of Optax.

    python benchmarks/optimizer_step.py --size 28m --output step.json
    python benchmarks/optimizer_step.py --size nano_125m_heads --only muon muon_8bit
    python benchmarks/optimizer_step.py --peer ../optax/optax --peer ../muon.py:build

Peers and variants are compiled for the same parameters and called in turn, each on its
own donated state, in one process. Columns: median seconds of a step without a change of
basis, its ratio to `optax.contrib.muon`, the mean of all steps, bytes of state, bytes
of temporaries that the compiler plans, and seconds to compile. SOAP renews its bases at
each tenth step: the mean of ten repeats has its share of it.

`--peer` adds the Muon of a checkout, a package folder or a file, and a column of ratios
to each; it is imported beside the installed packages, and rows name its version.

`nano_125m_heads` has the kernels of attention in three axes, `[features, heads,
head_dim]`, and times each variant once more on the same matrices in two.
"""

import argparse
import math
import statistics
import time

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers

import nanochat_jax as nj
from nanochat_jax.optimizer import matrix_optimizer


def layer(dim, ffn):
    return [(dim, dim)] * 4 + [(dim, ffn), (ffn, dim)]


def attention(dim, heads):
    """Shapes of query, key, value and output kernels, as Flax has them."""
    return [(dim, heads, dim // heads)] * 3 + [(heads, dim // heads, dim)]


def axes_of(path, shape):
    """The axes of a kernel of attention, in which heads are fewer than features."""
    del path
    heads_first = shape[0] < shape[1]
    return nj.MatrixAxes((0, 1), 2) if heads_first else nj.MatrixAxes(0, (1, 2))


INSTALLED = "optax.contrib.muon"

SIZES = {
    "tiny": layer(256, 1024),
    "tiny_heads": [*attention(256, 4), (256, 1024), (1024, 256)],
    "28m": layer(768, 3072) * 4,
    "nano_125m": [*layer(768, 2064), (768, 2064)] * 12,
    "nano_125m_heads": [*attention(768, 12), *[(768, 2064)] * 2, (2064, 768)] * 12,
    "nano_125m_stacked": [(12, *shape) for shape in [*layer(768, 2064), (768, 2064)]],
    "2048": layer(2048, 8192),
}


def variants(dim, others):
    """Returns the transforms to compare; learning rates do not matter for time."""
    config = lambda ns_dtype="float32", **kwargs: matrix_optimizer(
        nj.OptimizerConfig(galore_rank=dim // 4, ns_dtype=ns_dtype, **kwargs)
    )
    both = {"use_galore": True, "use_8bit_optim": True}
    plain = {"galore_residual": 0.0}
    poles = {"ns_method": "zolotarev", "ns_steps": 2}
    soap = {"use_8bit_optim": True, "precondition": "short", "quant_block_size": 256}
    normuon = {"use_8bit_optim": True, "normalize_rows": "normuon"}
    return {
        **{name: peer.muon(0.02) for name, peer in others.items()},
        "optax.contrib.galore": optax.contrib.galore(0.02, rank=dim // 4),
        "optax.adamw": optax.adamw(0.02),
        "muon": config(),
        "muon_bf16": config(ns_dtype="bfloat16"),
        "muon_aol_bf16": config(ns_dtype="bfloat16", ns_method="aol", ns_steps=4),
        "muon_zolotarev": config(**poles),
        "muon_8bit": config(use_8bit_optim=True),
        "muon_8bit_bf16": config(use_8bit_optim=True, ns_dtype="bfloat16"),
        "muon_8bit_zolotarev": config(use_8bit_optim=True, **poles),
        "galore": config(use_galore=True),
        "galore_bf16": config(use_galore=True, ns_dtype="bfloat16"),
        "galore_8bit": config(**both),
        "galore_8bit_bf16": config(**both, ns_dtype="bfloat16"),
        "galore_8bit_zolotarev": config(**both, **poles),
        "galore_plain": config(use_galore=True, **plain),
        "galore_plain_8bit": config(**both, **plain),
        "galore_plain_8bit_bf16": config(**both, **plain, ns_dtype="bfloat16"),
        "normuon_8bit": config(**normuon),
        "normuon_8bit_bf16": config(**normuon, ns_dtype="bfloat16"),
        "soap_8bit": config(**soap),
        "soap_8bit_bf16": config(**soap, ns_dtype="bfloat16"),
        "soap_4bit_bf16": config(**soap, quant_bits=4, ns_dtype="bfloat16"),
        "soap_both_8bit": config(**soap | {"precondition": "both"}),
    }


def with_heads(chosen, params, others):
    """Returns steps on kernels of three axes, and beside each on the same in two."""
    rule = lambda path, shape: axes_of(path, shape) if len(shape) == 3 else None
    views = {name: rule(name, x.shape) for name, x in params.items()}
    flat = {
        name: x if views[name] is None else x.reshape(views[name].view_shape(x.shape))
        for name, x in params.items()
    }
    steps = {}
    for name, tx in chosen.items():
        seen = nj.sequence(nj.as_matrices(tx, rule))
        if name in others:
            seen = others[name].muon(0.02, axes=views)
        steps[name] = Step(seen, params)
        steps[f"{name}, 2 axes"] = Step(tx, flat)
    return steps


class Step:
    """A compiled update with its own state, called again and again."""

    def __init__(self, tx, params):
        abstract = jax.eval_shape(tx.init, params)
        start = time.perf_counter()
        jitted = jax.jit(tx.update, donate_argnums=1)
        self.update = jitted.lower(params, abstract, params).compile()
        self.compile_seconds = time.perf_counter() - start
        self.state = jax.jit(tx.init)(params)
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))
        self.temp_bytes = self.update.memory_analysis().temp_size_in_bytes
        self.params = params

    def __call__(self):
        updates, self.state = self.update(self.params, self.state, self.params)
        return updates


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="28m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="variants, beside optax.contrib.muon")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="PATH[:FUNCTION]",
        help="checkout's Muon: contrib.muon of a package, muon of a file, if not given",
    )
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()
    others = {INSTALLED: peers.installed()}
    for peer in map(peers.load, args.peer):
        others[peer.version] = peer

    shapes = SIZES[args.size]
    rng = np.random.default_rng(0)
    params = {
        f"w{i}": jnp.asarray(rng.normal(size=shape) * 0.02, jnp.float32)
        for i, shape in enumerate(shapes)
    }
    chosen = variants(max(shapes[0]), others)
    unknown = set(args.only or []) - chosen.keys()
    if unknown:
        parser.error(f"--only takes some of {list(chosen)}, got {sorted(unknown)}")
    if args.only:
        names = {*others, *args.only}
        chosen = {name: tx for name, tx in chosen.items() if name in names}
    steps = {name: Step(tx, params) for name, tx in chosen.items()}
    if args.size.endswith("heads"):
        steps = with_heads(chosen, params, others)
    seconds = common.interleave(steps, args.repeats)
    rows = [
        {
            "variant": name,
            "seconds": common.median(seconds[name]),
            "mean_seconds": statistics.fmean(seconds[name]),
            "ratio": common.ratio(seconds[INSTALLED], seconds[name]),
            "ratios": {
                peer.version: common.ratio(seconds[other], seconds[name])
                for other, peer in others.items()
            },
            "state_bytes": step.state_bytes,
            "temp_bytes": step.temp_bytes,
            "compile_seconds": step.compile_seconds,
        }
        for name, step in steps.items()
    ]
    result = {
        "size": args.size,
        "machine": common.machine(),
        "peers": {name: peer.version for name, peer in others.items()},
        "rows": rows,
    }
    common.write(args.output, result)
    print(result["machine"])
    count = sum(math.prod(shape) for shape in shapes)
    common.show(
        f"One optimizer step, {args.size}: {count / 1e6:.1f}M parameters",
        [
            {
                "variant": row["variant"],
                "s": f"{row['seconds']:.3f}",
                **{f"over {name}": f"{x:.2f}" for name, x in row["ratios"].items()},
                "mean s": f"{row['mean_seconds']:.3f}",
                "state MB": f"{row['state_bytes'] / 1e6:.1f}",
                "temp MB": f"{row['temp_bytes'] / 1e6:.1f}",
                "compile s": f"{row['compile_seconds']:.1f}",
            }
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
