#!/usr/bin/env bash
# A tokenizer.json gives other ids when a config.json of a Qwen3 lies beside it.
#
# One would expect `AutoTokenizer` to read the splitting rule from `tokenizer.json`, which has one. With
# that file alone, or beside the config of a Llama, it does. Beside a config of Qwen3 or Qwen2 it takes
# the class of these models, which keeps vocabulary and merges and replaces the rule by Qwen's: digits
# come apart one by one. Text decodes to the same, so nothing is noticed but a worse model.
# `"tokenizer_class": "PreTrainedTokenizerFast"` in `tokenizer_config.json` keeps the rule for Qwen3.
#
# Seen with transformers 5.24.0 and tokenizers 0.23.3: the one token "2026" becomes "2", "0", "2", "6".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check \
  transformers==5.24.0 tokenizers==0.23.3 2>/dev/null
"$folder/bin/python" - "$folder" <<'PY' 2>/dev/null
import json
import pathlib
import sys

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<|endoftext|>"])
tokenizer.train_from_iterator(["year 2026"] * 50, trainer)
own = {"tokenizer_class": "PreTrainedTokenizerFast"}
seen = {}
for name, kind, settings in [
    ("alone", None, None),
    ("llama", "llama", None),
    ("qwen3", "qwen3", None),
    ("qwen3, class named", "qwen3", own),
]:
    model = pathlib.Path(sys.argv[1], name)
    model.mkdir()
    tokenizer.save(str(model / "tokenizer.json"))
    if kind:
        (model / "config.json").write_text(json.dumps({"model_type": kind}))
    if settings:
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = AutoTokenizer.from_pretrained(str(model))
    seen[name] = loaded.convert_ids_to_tokens(loaded("year 2026").input_ids)
    print(f"{name}: {type(loaded).__name__}, {seen[name]}")
whole = ["year", "2026"]
assert seen == {
    "alone": whole,
    "llama": whole,
    "qwen3": ["year", "2", "0", "2", "6"],
    "qwen3, class named": whole,
}
PY
