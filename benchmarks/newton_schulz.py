"""Times Newton-Schulz by method, shape, type and form, with its error.

    python benchmarks/newton_schulz.py --output newton_schulz.json

The error is that of the update against the polar factor of a float64 decomposition,
relative in Frobenius norm, for a Gaussian matrix. Ratios are to the quintic in float32
in its standard form, in the same run.
"""

import argparse
import functools

import common
import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import POLYNOMIALS, newton_schulz
from nanochat_jax.numerics import newton_schulz_flops, zolotarev, zolotarev_flops
from nanochat_jax.polynomials import ZOLOTAREV

SHAPES = [(256, 256), (768, 768), (768, 2064), (192, 2064)]
RUNS = [("float32", "standard"), ("float32", "gram"), ("bfloat16", "standard")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=list(POLYNOMIALS))
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()

    rows = []
    for shape in SHAPES:
        x = np.random.default_rng(0).normal(size=shape)
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        polar, x = u @ vt, jnp.asarray(x, jnp.float32)
        steps, flops = {}, {}
        for name in dict.fromkeys(["quintic", *args.methods]):
            for dtype, form in RUNS:
                options = {"dtype": dtype, "form": form}
                label = f"{name} {dtype} {form}"
                steps[label] = functools.partial(
                    newton_schulz, polynomials=POLYNOMIALS[name], **options
                )
                flops[label] = newton_schulz_flops(shape, POLYNOMIALS[name], **options)
        for poles, fractions in ZOLOTAREV.items():
            label = f"zolotarev float32, {poles} poles"
            steps[label] = functools.partial(zolotarev, fractions=fractions)
            flops[label] = zolotarev_flops(shape, fractions)
        calls = {
            label: functools.partial(jax.jit(step), x) for label, step in steps.items()
        }
        seconds = common.interleave(calls, args.repeats)
        base = seconds["quintic float32 standard"]
        for label, call in calls.items():
            times = seconds[label]
            error = np.linalg.norm(np.asarray(call(), np.float64) - polar)
            rows.append(
                {
                    "variant": label,
                    "shape": list(shape),
                    "seconds": common.median(times),
                    "ratio": common.ratio(base, times),
                    "gflop_per_s": flops[label] / common.median(times) / 1e9,
                    "error": error / np.linalg.norm(polar),
                }
            )
    result = {"machine": common.machine(), "rows": rows}
    common.write(args.output, result)
    print(result["machine"])
    common.show(
        "Orthogonalisation",
        [
            {
                "variant": row["variant"],
                "shape": "x".join(map(str, row["shape"])),
                "ms": f"{1e3 * row['seconds']:.2f}",
                "times faster": f"{row['ratio']:.2f}",
                "GFLOP/s": f"{row['gflop_per_s']:.0f}",
                "error": f"{row['error']:.3f}",
            }
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
