"""Byte-level BPE vocabularies, trained on documents.

Every byte is a token, so any text can be encoded and decoded without loss; merges of
frequent pairs are added until the vocabulary is full (Sennrich et al. 2016; on bytes as
in GPT-2, Radford et al. 2019).
"""

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanochat_jax.config import schema
from nanochat_jax.lm.data.end_token import END_OF_TEXT

MIN_VOCAB_SIZE = 257
"""The bytes, and the token that ends a document."""


def train(documents: Iterable[str], vocab_size: int) -> str:
    """Trains a vocabulary.

    The same documents in the same order give the same text.

    Args:
      documents: Texts, read once.
      vocab_size: Most tokens; fewer if no pair occurs twice any more.

    Returns:
      The content of a `tokenizer.json`.

    Raises:
      ValueError: If `vocab_size` is below 257.
    """
    schema.require(vocab_check(vocab_size))
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer.to_str(pretty=True)


def vocab_check(vocab_size: int) -> schema.Check:
    """Returns the check that a vocabulary has room for all bytes.

    Args:
      vocab_size: Most tokens of the vocabulary.
    """
    message = f"`vocab_size` must be at least {MIN_VOCAB_SIZE}, got {vocab_size}."
    return vocab_size >= MIN_VOCAB_SIZE, message


def token_bytes(text: str) -> list[int]:
    """Returns the bytes of text of each id; the separator counts as one.

    Args:
      text: Content of a `tokenizer.json` from `train`.
    """
    vocab = tokenizers.Tokenizer.from_str(text).get_vocab()
    # The vocabulary writes each byte as one character.
    lengths = {vocab[token]: len(token) for token in vocab}
    lengths[vocab[END_OF_TEXT]] = 1
    return [lengths[id_] for id_ in sorted(lengths)]
