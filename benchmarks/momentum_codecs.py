"""Compares ways to store momentum in 4 bits, by what they do to Muon's update.

    python benchmarks/momentum_codecs.py --output momentum_codecs.json

Momentum is the average of normal gradients, given structure by a fixed map: none
(`normal`), singular values 1/k (`spectrum`), one column in fifty 30 times as large
(`columns`), or entries of lognormal size, σ = 1.5 (`entries`). For each way of storing:

  * `once`: error of storing the exact average once, relative in Frobenius norm;
  * `steady`: error after many steps, each of which reads, averages and stores again;
    where errors of different steps are independent it is `once / √(1 - β²)`;
  * `update once`, `update`: the same after Newton-Schulz, the error of the update.
"""

import argparse

import candidates
import common
import jax
import jax.numpy as jnp

from nanochat_jax import newton_schulz


def structures(shape):
    """Returns by name the map from white noise to gradients."""
    m, n = shape
    keys = jax.random.split(jax.random.key(1), 2)
    rotation = jnp.linalg.qr(jax.random.normal(keys[0], (m, m)))[0]
    spectrum = rotation / jnp.arange(1, m + 1)
    columns = jnp.where(jnp.arange(n) % 50 == 7, 30.0, 1.0)[None]
    sizes = jnp.exp(1.5 * jax.random.normal(keys[1], shape))
    return {
        "normal": lambda noise: noise,
        "spectrum": lambda noise: spectrum @ noise,
        "columns": lambda noise: noise * columns,
        "entries": lambda noise: noise * sizes,
    }


def simulate(store, structure, shape, beta, steps):
    """Returns the exact average of gradients, and it as stored at each step."""

    def step(carry, key):
        exact, stored = carry
        noise_key, store_key = jax.random.split(key)
        gradient = structure(jax.random.normal(noise_key, shape))
        exact = beta * exact + (1 - beta) * gradient
        stored = store(beta * stored + (1 - beta) * gradient, store_key)
        return (exact, stored), None

    keys = jax.random.split(jax.random.key(0), steps)
    (exact, stored), _ = jax.lax.scan(step, (jnp.zeros(shape),) * 2, keys)
    return exact, stored, store(exact, keys[0])


def measure(store, structure, shape, beta, steps):
    exact, stored, once = jax.jit(
        lambda: simulate(store, structure, shape, beta, steps)
    )()
    update = newton_schulz(exact)
    error = lambda x, y: float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))
    return {
        "once": error(once, exact),
        "steady": error(stored, exact),
        "update once": error(newton_schulz(once), update),
        "update": error(newton_schulz(stored), update),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(256, 512))
    parser.add_argument("--beta", type=float, default=0.95)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--only", nargs="*", help="names of candidates")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args()

    shape, rows = tuple(args.shape), []
    for name, candidate in candidates.candidates(shape).items():
        if args.only and name not in args.only:
            continue
        for structure, map_noise in structures(shape).items():
            errors = measure(candidate.store, map_noise, shape, args.beta, args.steps)
            row = {"variant": name, "bits": candidate.bits, "structure": structure}
            rows.append(row | errors)
    settings = {"shape": shape, "beta": args.beta, "steps": args.steps}
    result = {"machine": common.machine(), "settings": settings, "rows": rows}
    common.write(args.output, result)
    print(result["machine"])
    for structure in structures(shape):
        chosen = [row for row in rows if row["structure"] == structure]
        common.show(
            f"Momentum {shape[0]}x{shape[1]}, {structure}, beta {args.beta}",
            [
                {
                    "variant": row["variant"],
                    "bits": f"{row['bits']:.3f}",
                    **{
                        f"{name} %": f"{100 * row[name]:.1f}"
                        for name in ("once", "steady", "update once", "update")
                    },
                }
                for row in chosen
            ],
        )


if __name__ == "__main__":
    main()
