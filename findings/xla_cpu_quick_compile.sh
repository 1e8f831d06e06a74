#!/usr/bin/env bash
# XLA's fusion emitters are most of a compilation without optimisation, and little of one with it.
#
# Who wants programs compiled quickly on a processor, as tests do, sets `--xla_backend_optimization_level=0`,
# and would expect a flag that saves next to nothing by default to save next to nothing there. Without the
# MLIR fusion emitters what is left falls to less than a third, whereas with optimisation as by default the
# older emitters in their place save a quarter at most. So neither flag tells what both do, and the two
# together compile six to eight times as fast as the default.
#
# Seen with jax and jaxlib 0.10.2 and optax 0.2.8, the update of `optax.contrib.muon` for six matrices,
# seconds of processor time on two cores: 2.5 to 2.7 by default, 2.1 to 2.5 without the emitters, 1.3 to 1.7 at
# level 0, 0.3 to 0.5 with both. jaxlib 0.12 does not know the second flag.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 optax==0.2.8 2>/dev/null
cat > "$folder/compile.py" <<'PY'
import time

import jax
import jax.numpy as jnp
import optax

tx = optax.contrib.muon(0.1)
shapes = [(256, 128 * (i + 1)) for i in range(6)]
params = {str(shape): jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes}
state = jax.eval_shape(tx.init, params)
lowered = jax.jit(tx.update).lower(params, state, params)
start = time.process_time()
lowered.compile()
print(time.process_time() - start)
PY
seconds() {  # the least of three
  for _ in 1 2 3; do
    JAX_PLATFORMS=cpu XLA_FLAGS="$*" "$folder/bin/python" "$folder/compile.py" 2>/dev/null
  done | sort -g | head -1
}
level=--xla_backend_optimization_level=0
emitters=--xla_cpu_use_fusion_emitters=false
default=$(seconds) without=$(seconds $emitters) zero=$(seconds $level) both=$(seconds $level $emitters)
awk -v a="$default" -v b="$without" -v c="$zero" -v d="$both" 'BEGIN {
  printf "default %.2f s, without emitters %.2f s, level 0 %.2f s, both %.2f s\n", a, b, c, d
  exit !(b > 0.6 * a && d < 0.5 * c)
}'
