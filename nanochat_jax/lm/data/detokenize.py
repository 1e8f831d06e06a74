"""Text from tokens, piece by piece, as they are made."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from nanochat_jax.lm.data.tokenizer import Tokenizer

# Replacement character of incomplete or invalid UTF-8.
_INCOMPLETE = "\ufffd"


def up_to(tokens: Iterable[int], end: int) -> Iterator[int]:
    """Returns tokens up to the first that is `end`, without it.

    Args:
      tokens: Token ids, read on demand.
      end: Token id that ends the text.
    """
    return itertools.takewhile(lambda token: token != end, tokens)


def decode_stream(
    tokenizer: Tokenizer, tokens: Iterable[int], prompt: Sequence[int] = ()
) -> Iterator[str]:
    """Yields the text of tokens, each piece as soon as it is complete.

    The bytes of a character may come from several tokens; they are held back until the
    last one. Joined, the pieces are the text; each is valid UTF-8.

    Args:
      tokenizer: Tokenizer of the tokens.
      tokens: Token ids.
      prompt: Ids before them. Their text is not yielded.

    Yields:
      Pieces of text, none of them empty.
    """
    # Decodes everything anew for each token, since some tokenizers need the context. It
    # costs nothing beside a step of the model.
    ids = list(prompt)
    text = tokenizer.decode(ids)
    done = len(text)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        complete = text.rstrip(_INCOMPLETE)
        if len(complete) > done:
            yield complete[done:]
            done = len(complete)
    if len(text) > done:
        yield text[done:]


def cut_at(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yields text up to the first stop string, without it.

    Args:
      pieces: Pieces of text, read on demand.
      stops: Stop strings, none of them empty.

    Yields:
      Pieces of text; a possible beginning of a stop string is held back.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            _, start = min(found)
            held = held[:start]
            break
        safe = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that begins `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
