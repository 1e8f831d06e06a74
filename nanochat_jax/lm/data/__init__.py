"""TODO."""

from nanochat_jax.lm.data import (
    bpe as bpe,
    dataset_folder as dataset_folder,
    documents as documents,
)
from nanochat_jax.lm.data.batches import (
    Batches as Batches,
    eval_batches as eval_batches,
)
from nanochat_jax.lm.data.corpus import Corpus as Corpus, load_corpus as load_corpus
from nanochat_jax.lm.data.detokenize import (
    cut_at as cut_at,
    decode_stream as decode_stream,
)
from nanochat_jax.lm.data.tokenizer import (
    Tokenizer as Tokenizer,
    load_tokenizer as load_tokenizer,
)
