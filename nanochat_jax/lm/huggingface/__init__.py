"""Folders of Hugging Face's `transformers`: models read from them, and written to them.

config_keys    keys of a `config.json` that say what is computed, and those that do not
json_files     JSON objects, read with the file's name in errors
names          names of the tensors, and the parameters that they are
read_config    settings of a model from a `config.json`
read_weights   parameters from the tensors, one by one
rope           base and scaling of rotary positions, in both spellings
tensor_files   tensors in one safetensors file or in parts, opened and checked
tokenizers     tokenizer and end token of a folder, and what is written of them
write_folder   the whole folder, with its settings and tokenizer
write_weights  parameters as tensors, in one file or in parts
"""

from nanochat_jax.lm.huggingface.read_config import read_config as read_config
from nanochat_jax.lm.huggingface.read_weights import read_weights as read_weights
from nanochat_jax.lm.huggingface.tokenizers import (
    end_token as end_token,
    tokenizer_path as tokenizer_path,
)
from nanochat_jax.lm.huggingface.write_folder import (
    check_writable as check_writable,
    write_folder as write_folder,
)
