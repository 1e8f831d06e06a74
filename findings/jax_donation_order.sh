#!/usr/bin/env bash
# Which result of a jitted function gets a donated buffer depends on the order of the results.
#
# One would expect `jax.jit(tx.update, donate_argnums=1)` to write the new state of an optimizer over the
# old. JAX gives a donated buffer to the first result of its shape and type, whatever it is made from, and
# Optax returns the updates before the state: so the momentum's buffer goes to the updates. Where a loop
# writes both a row at a time, XLA then plans a copy of all rows, and none with the same results in the
# other order.
#
# Seen with jax and jaxlib 0.10.2 and optax 0.2.8, on a processor: the alias of `optax.trace` is of the
# updates, and a loop over 64 rows of 64 KiB plans temporaries of 4.1 MiB, or of 0.2 MiB the other way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 optax==0.2.8 2>/dev/null
JAX_PLATFORMS=cpu "$folder/bin/python" - <<'PY' 2>/dev/null
import re

import jax
import jax.numpy as jnp
import optax

rows = jax.ShapeDtypeStruct((64, 128, 128), jnp.float32)
trace = optax.trace(0.9)
state = jax.eval_shape(trace.init, rows)
compiled = jax.jit(trace.update, donate_argnums=1).lower(rows, state).compile()
alias = re.search(r"input_output_alias=\{ (\{\d*\}: \(\d+)", compiled.as_text()).group(1)
print("optax.trace, result: (argument", alias)
assert alias == "{0}: (1"


def update(gradients, momentum):
    # Barriers around the work, so that rows are written in place.
    def row(i, carry):
        updates, momentum = carry
        g, m = jax.lax.optimization_barrier((updates[i], momentum[i]))
        m = 0.9 * m + g
        u, m = jax.lax.optimization_barrier((m @ m.T @ m, m))
        return updates.at[i].set(u), momentum.at[i].set(m)

    return jax.lax.fori_loop(0, len(gradients), row, (gradients, momentum))


planned = {}
for name, f in {
    "updates first": update,
    "momentum first": lambda g, m: update(g, m)[::-1],
}.items():
    compiled = jax.jit(f, donate_argnums=1).lower(rows, rows).compile()
    planned[name] = compiled.memory_analysis().temp_size_in_bytes
    print(f"{name}: {planned[name] / 2**20:.1f} MiB of temporaries")
assert planned["updates first"] >= 4 * 2**20
assert planned["momentum first"] < 2**20
PY
