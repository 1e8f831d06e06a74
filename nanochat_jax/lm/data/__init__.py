"""Data: from text to batches of token ids.

batches         windows of a token array, as a function of seed and step
bpe             training of byte-level BPE vocabularies
corpus          text, token files or a Markov chain, for training and validation
dataset_folder  a folder with a trained tokenizer and the token ids of documents
detokenize      text from tokens, piece by piece, up to a stop string
documents       text files, and the sources of Python's standard library
end_token       the token that ends a document
joined          several arrays of ids as one, without a copy
markov_chain    a chain of known entropy
paths           files, folders and patterns, in a stable order
records         documents and conversations in JSON lines and Parquet
token_file      token ids on disk, memory-mapped, recognised and checked
tokenizer       the byte tokenizer, and those of a `tokenizer.json`
"""

from nanochat_jax.lm.data import (
    bpe as bpe,
    dataset_folder as dataset_folder,
    documents as documents,
)
from nanochat_jax.lm.data.batches import (
    Batches as Batches,
    eval_batches as eval_batches,
)
from nanochat_jax.lm.data.corpus import (
    Corpus as Corpus,
    FileOptions as FileOptions,
    load_corpus as load_corpus,
)
from nanochat_jax.lm.data.detokenize import (
    cut_at as cut_at,
    decode_stream as decode_stream,
    up_to as up_to,
)
from nanochat_jax.lm.data.end_token import configured_end as configured_end
from nanochat_jax.lm.data.tokenizer import (
    Tokenizer as Tokenizer,
    load_tokenizer as load_tokenizer,
)
