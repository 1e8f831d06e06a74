"""Times matrix products by type and size: the machine's own rate, the limit of Muon.

    python benchmarks/products.py --output products.json

A chain of products, each of the one before, in one compiled loop, so that no call is
waited for. Newton-Schulz consists of such products and cannot be faster.
"""

import argparse
import functools

import common
import jax
import jax.numpy as jnp
from jax import lax

SIZES = (256, 768, 2048, 8192)
TYPES = ("float32", "bfloat16")


@functools.partial(jax.jit, static_argnums=1)
def chain(x, count):
    """Multiplies `x` into itself `count` times, and keeps its entries small."""

    def multiply(_, y):
        # Added up in float32, as in Newton-Schulz, which a processor needs to be fast.
        return jnp.matmul(x, y, preferred_element_type=jnp.float32).astype(x.dtype)

    return lax.fori_loop(0, count, multiply, x)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=2048, help="side of a matrix")
    parser.add_argument("--flops", type=float, default=2e10, help="of one timed call")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()
    sizes = [n for n in SIZES if n <= args.largest]
    counts = {n: max(1, round(args.flops / (2 * n**3))) for n in sizes}
    calls = {}
    for n in sizes:
        x = jax.random.normal(jax.random.key(0), (n, n)) / n**0.5
        for dtype in TYPES:
            call = functools.partial(chain, x.astype(dtype), counts[n])
            calls[f"{n} {dtype}"] = call
    seconds = common.interleave(calls, args.repeats)
    rows = []
    for name, times in seconds.items():
        size, dtype = name.split()
        flops = 2 * int(size) ** 3 * counts[int(size)]
        rate = flops / common.median(times) / 1e9
        rows.append({"variant": dtype, "side": int(size), "gflop_per_s": rate})
    result = {"machine": common.machine(), "rows": rows}
    common.write(args.output, result)
    print(result["machine"])
    printed = [row | {"gflop_per_s": f"{row['gflop_per_s']:.0f}"} for row in rows]
    common.show("Products of square matrices", printed)


if __name__ == "__main__":
    main()
