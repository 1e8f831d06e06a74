"""Times AdamW in few bits beside that of flashoptim-jax, and counts its bytes.

    pip install flashoptim-jax==0.1.0
    python benchmarks/adamw_few_bits.py --size 28m --output adamw.json

Weights are bfloat16 with 8 further bits, both moments are in 8 bits. A step takes
gradients, weights and state to the next weights and state, the last two donated. The
optimizers take turns in one process. Columns: bytes a parameter of weights and state,
bytes of temporaries that the compiler plans, median seconds of a step, and how many
times faster than flashoptim-jax. Its kernels need a GPU; elsewhere its plain path runs.
"""

import argparse
from importlib.metadata import version

import common
import flashoptim_jax
import jax
import jax.numpy as jnp
import optax
from optimizer_step import SIZES

import nanochat_jax as nj
from nanochat_jax.transforms import apply_gradients, applying

PEER = "flashoptim-jax"
RATE, DECAY = 1e-3, 1e-2


def plain():
    """Returns AdamW as a user writes it."""
    codecs = {"mu": nj.Int8(), "nu": nj.Dynamic8(signed=False, zero=False)}
    return optax.chain(
        nj.quantize_state(optax.scale_by_adam(), codecs),
        optax.add_decayed_weights(DECAY),
        optax.scale_by_learning_rate(RATE),
        nj.split_master(8),
    )


def optimizers():
    """Returns `init` and `step(params, state, grads)` of each optimizer."""
    on_gpu = jax.default_backend() == "gpu"
    peer = flashoptim_jax.flash_adamw(RATE, weight_decay=DECAY, fused=on_gpu)
    ours = plain()
    in_turn = nj.sequence(applying(plain()), core_ndim=1)
    step_of = lambda tx: (
        lambda params, state, grads: apply_gradients(tx, grads, state, params)
    )
    return {
        PEER: (peer.init, peer.step),
        "ours": (ours.init, step_of(ours)),
        "ours, in sequence": (in_turn.init, step_of(in_turn)),
    }


class Step:
    """A compiled step with its own weights and state, called again and again."""

    def __init__(self, init, step, params, grads):
        self.grads = grads
        self.params = jax.tree.map(jnp.copy, params)
        self.state = jax.jit(init)(params)
        jitted = jax.jit(step, donate_argnums=(0, 1))
        self.step = jitted.lower(self.params, self.state, grads).compile()
        self.temp_bytes = self.step.memory_analysis().temp_size_in_bytes
        held = sum(x.nbytes for x in jax.tree.leaves((self.params, self.state)))
        self.bytes_each = held / optax.tree.size(params)

    def __call__(self):
        self.params, self.state = self.step(self.params, self.state, self.grads)
        return self.params


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="28m")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output")
    args = parser.parse_args()
    draw = lambda i, shape: jax.random.normal(jax.random.key(i), shape) / 50
    shapes = dict(enumerate(SIZES[args.size]))
    params = {f"{i}": draw(i, s).astype(jnp.bfloat16) for i, s in shapes.items()}
    grads = {f"{i}": draw(-i - 1, s).astype(jnp.bfloat16) for i, s in shapes.items()}
    steps = {
        name: Step(*functions, params, grads)
        for name, functions in optimizers().items()
    }
    seconds = common.interleave(steps, args.repeats)
    rows = [
        {
            "variant": name,
            "bytes a parameter": round(step.bytes_each, 3),
            "temporaries MB": round(step.temp_bytes / 1e6, 1),
            "seconds": round(common.median(seconds[name]), 4),
            "times faster": round(common.ratio(seconds[PEER], seconds[name]), 2),
        }
        for name, step in steps.items()
    ]
    peer = f"{PEER} {version(PEER)}"
    common.show(f"AdamW in few bits, {args.size}, beside {peer}", rows)
    common.write(args.output, {"machine": common.machine(), "peer": peer, "rows": rows})


if __name__ == "__main__":
    main()
