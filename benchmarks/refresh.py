"""Times the change of GaLore's basis: randomised against exact decomposition.

    python benchmarks/refresh.py --output refresh.json

Both give the leading `rank` left singular directions of a Gaussian matrix, in turn in
one run. `captured` is the energy of the projection over the most any basis can have.
LAPACK has one thread, as on the command line, unless `OPENBLAS_NUM_THREADS` is set.
"""

import argparse
import functools
import itertools
import os

import common
import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.numerics.range_finder import range_basis

CASES = [((768, 768), 192), ((768, 2064), 192), ((768, 2064), 256), ((2048, 8192), 256)]


@functools.partial(jax.jit, static_argnames="rank")
def exact(x, rank):
    return jnp.linalg.svd(x, full_matrices=False)[0][:, :rank]


randomised = jax.jit(
    range_basis, static_argnames=("rank", "power_iterations", "aligned")
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--largest", type=int, default=2064, help="longest side")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()

    threads = os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    rows = []
    for shape, rank in CASES:
        if max(shape) > args.largest:
            continue
        x = jax.random.normal(jax.random.key(0), shape)
        calls = {"exact": functools.partial(exact, x, rank)}
        for steps, aligned in itertools.product((1, 2, 3), (False, True)):
            name = f"{steps} power steps" + (", aligned" if aligned else "")
            calls[name] = functools.partial(
                randomised, x, rank, 1, power_iterations=steps, aligned=aligned
            )
        seconds = common.interleave(calls, args.repeats)
        best = float(np.sum(np.linalg.svd(x, compute_uv=False)[:rank] ** 2))
        for name, call in calls.items():
            basis = call()
            rows.append(
                {
                    "variant": name,
                    "shape": list(shape),
                    "rank": rank,
                    "seconds": common.median(seconds[name]),
                    "ratio": common.ratio(seconds["exact"], seconds[name]),
                    "captured": float(jnp.sum((basis.mT @ x) ** 2)) / best,
                }
            )
    result = {"machine": common.machine(), "lapack_threads": threads, "rows": rows}
    common.write(args.output, result)
    print(result["machine"])
    common.show(
        "Change of basis",
        [
            {
                "variant": row["variant"],
                "shape": "x".join(map(str, row["shape"])),
                "rank": row["rank"],
                "ms": f"{1e3 * row['seconds']:.1f}",
                "times faster": f"{row['ratio']:.1f}",
                "captured": f"{row['captured']:.4f}",
            }
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
