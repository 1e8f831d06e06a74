"""Text from tokens, piece by piece, as they are made."""

from collections.abc import Iterable, Iterator, Sequence

from nanochat_jax.lm.data.tokenizer import Tokenizer

# What stands for bytes that are no text, or not yet.
_INCOMPLETE = "\ufffd"


def decode_stream(
    tokenizer: Tokenizer, tokens: Iterable[int], prompt: Sequence[int] = ()
) -> Iterator[str]:
    """Yields the text of tokens, each piece as soon as it is certain.

    A character may be spread over tokens; its first bytes are held back until the last
    one is there. Together the pieces are the whole text, and every one is valid UTF-8.

    Args:
      tokenizer: Tokenizer of the tokens.
      tokens: Token ids.
      prompt: Ids before them, whose text is not yielded.

    Yields:
      Pieces of text, none of them empty.
    """
    # All is decoded anew for each token, as some tokenizers need what precedes. Beside
    # a step of the model this costs nothing.
    ids = list(prompt)
    text = tokenizer.decode(ids)
    done = len(text)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        certain = text.rstrip(_INCOMPLETE)
        if len(certain) > done:
            yield certain[done:]
            done = len(certain)
    if len(text) > done:
        yield text[done:]


def cut_at(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yields text up to that of some texts which ends first, itself not yielded.

    Args:
      pieces: Pieces of text. No more are asked for than needed.
      stops: Texts to stop at, none of them empty.

    Yields:
      Pieces of text; what may be the beginning of a stop is held back.
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
    """Returns how many characters at the end of `text` begin `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
