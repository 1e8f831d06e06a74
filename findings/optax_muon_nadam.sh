#!/usr/bin/env bash
# optax.contrib.muon trains what is no matrix by NAdamW, not AdamW, unless told otherwise.
#
# One would expect `nesterov=True`, its default, to be about Muon's momentum. It is handed to
# the AdamW of biases, norms and embeddings too, whose first update is then
# 1 + b1 * (1 - b1) / (1 - b1^2) = 1.4737 times as large for b1 = 0.9: their learning rates are
# not comparable with those of optax.adamw.
#
# Seen with optax 0.2.8, jax 0.10.2: first updates of a bias with gradient 1 at rate 1:
# contrib.muon -1.4737, adamw -1.0000, nadamw -1.4737, contrib.muon(nesterov=False) -1.0000.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 optax==0.2.8 2>/dev/null
JAX_PLATFORMS=cpu "$folder/bin/python" - <<'PY'
import jax.numpy as jnp
import optax

params = {"bias": jnp.zeros(3)}
grads = {"bias": jnp.ones(3)}


def first(tx):
    updates, _ = tx.update(grads, tx.init(params), params)
    return float(updates["bias"][0])


found = {
    "contrib.muon": first(optax.contrib.muon(1.0)),
    "contrib.muon(nesterov=False)": first(optax.contrib.muon(1.0, nesterov=False)),
    "adamw": first(optax.adamw(1.0, weight_decay=0.0)),
    "nadamw": first(optax.nadamw(1.0, weight_decay=0.0)),
}
print(optax.__version__, found)
assert abs(found["contrib.muon"] - found["nadamw"]) < 1e-4
assert abs(found["contrib.muon"] - found["adamw"]) > 0.1
assert abs(found["contrib.muon(nesterov=False)"] - found["adamw"]) < 1e-4
PY
