#!/usr/bin/env bash
# safetensors writes a NumPy array that is not in C order as other numbers, and says nothing.
#
# One would expect `safetensors.numpy.save_file` to refuse such an array, as the half for PyTorch does
# with tensors that are not contiguous, or to copy it. It writes the memory as it lies under the shape
# of the array: a transposed kernel, or a part of a padded table, comes back with its entries in other
# places. JAX hands out such arrays too, where a compiled function gives a result its own layout.
# `numpy.ascontiguousarray` before the call is enough.
#
# Seen with safetensors 0.8.0 and numpy 2.4.6: [[0, 1, 2], [3, 4, 5]] in Fortran order is read back as
# [[0, 3, 1], [4, 2, 5]].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6 2>/dev/null
"$folder/bin/python" - "$folder/x.safetensors" <<'PY'
import sys

import numpy as np
from safetensors.numpy import load_file, save_file

rows = np.arange(6, dtype=np.float32).reshape(2, 3)
for name, array in {"C": rows, "Fortran": np.asfortranarray(rows)}.items():
    save_file({"x": array}, sys.argv[1])
    print(f"{name} order: {array.tolist()} is read back as", load_file(sys.argv[1])["x"].tolist())
assert load_file(sys.argv[1])["x"].tolist() == [[0, 3, 1], [4, 2, 5]]
PY
