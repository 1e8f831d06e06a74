#!/usr/bin/env bash
# optax.contrib.galore projects the longer axis of a matrix, where the paper projects the shorter.
#
# GaLore (Zhao et al. 2024, section 3) and its authors' package keep a basis of the shorter
# axis, [short, r], and moments [r, long]. Optax keeps a basis [long, r] and moments
# [short, r]: fewer numbers, but the shorter side is not compressed at all, and the basis,
# which is decomposed and stored, is the larger of the two. A rank is cut to the shorter side.
#
# Seen with optax 0.2.8, jax 0.10.2: at rank 8 a 64 x 256 matrix has a projector (256, 8) and
# moments (64, 8), 3,072 numbers with two moments; by the paper (64, 8) and (8, 256), 4,608.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 optax==0.2.8 2>/dev/null
JAX_PLATFORMS=cpu "$folder/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import optax

for shape in ((64, 256), (256, 64)):
    params = {"kernel": jnp.ones(shape)}
    state = optax.contrib.galore(1.0, rank=8).init(params)
    shapes = {
        jax.tree_util.keystr(path).split(".")[-1].split("[")[0]: x.shape
        for path, x in jax.tree.leaves_with_path(state)
        if x.ndim == 2
    }
    print(optax.__version__, shape, shapes)
    assert shapes["projector"] == (256, 8), shapes  # of the longer side, both times
    assert 64 in shapes["mu"], shapes  # the shorter one is not compressed
PY
