#!/usr/bin/env bash
# Whether `datasets` stores a value in a column depends on the column's name and on the batch size.
#
# One would expect the type of a column to follow from its values. A column named `attention_mask` is
# int8 where the first batch that is written fits, whatever its values are for: 200, such as the length
# of a document for packed attention, raises in a later batch, and makes the column int64 if it comes
# in the first. The same values in a column of another name are int64 always.
#
# Seen with datasets 5.2.0 and pyarrow 26.0.1: ArrowInvalid with batches of 1 and 2 rows, int64 with 4.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check \
  datasets==5.2.0 pyarrow==26.0.1 2>/dev/null
HF_HOME="$folder" "$folder/bin/python" - <<'PY' 2>/dev/null
from datasets import Dataset

rows = Dataset.from_dict({"i": list(range(4))})
seen = []
for name in ("mask", "attention_mask"):
    for size in (1, 2, 4):
        values = lambda batch: {name: [[1, 1 if i < 2 else 200] for i in batch["i"]]}
        try:
            made = rows.map(values, batched=True, batch_size=size, remove_columns=["i"])
            seen.append(made.features[name].feature.dtype)
        except Exception as error:
            seen.append(type(error).__name__)
        print(f"column {name}, batches of {size}: {seen[-1]}")
assert seen == ["int64"] * 3 + ["ArrowInvalid"] * 2 + ["int64"]
PY
