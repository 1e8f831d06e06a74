"""Conversations as ids, by the tokenizer's own chat template.

Only the assistant's part is predicted: what follows the prompt that asks for its turn,
up to the end of its text and the token that ends the turn. An id that is read but not
predicted is stored as its complement, `~id`, which is negative.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.config import schema
from nanochat_jax.lm.data.records.packages import load_packages
from nanochat_jax.lm.data.tokenizer import Tokenizer, TrainedTokenizer

Message = Mapping[str, Any]

Render = Callable[[Sequence[Message], bool], str]
"""Returns the text of messages, with the prompt for the assistant's turn if asked."""

_NO_TEMPLATE = (
    "Put the `tokenizer_config.json` or `chat_template.jinja` of the model beside it"
)


class Chat:
    """Turns conversations into ids.

    Args:
      tokenizer: Tokenizer of the model; a `tokenizer.json` with its chat template
        beside it.
      render: Renders messages; the template of the tokenizer if not given.

    Raises:
      ValueError: If there is no template, or transformers is missing.
    """

    def __init__(self, tokenizer: Tokenizer, render: Render | None = None):
        if not isinstance(tokenizer, TrainedTokenizer):
            raise ValueError(
                "conversations take a tokenizer with a chat template. Set `tokenizer` "
                "to the `tokenizer.json` of the model."
            )
        self._tokenizer = tokenizer
        self._render = render or _template_of(Path(tokenizer.source))
        special = map(re.escape, sorted(tokenizer.special, key=len, reverse=True))
        self._turn_end = rf"\s*(?:{'|'.join(special)})" if tokenizer.special else ""

    def encode(self, messages: Sequence[Message]) -> np.ndarray:
        """Returns the ids of a conversation, int32 `[length]`, with the end token last.

        Args:
          messages: Messages with `role` and `content`.

        Raises:
          ValueError: If they are no conversation with an assistant, or the template
            does not take them.
        """
        _check_messages(messages)
        text = self._rendered(messages, False)
        ids, starts, ends = self._tokenizer.encode_template(text)
        predicted = np.zeros(len(ids), bool)
        for start, end in self._spans(messages, text):
            predicted |= (starts >= start) & (ends <= end) & (ends > starts)
        if not predicted.any():
            raise ValueError("no token is of the assistant's text alone.")
        ids = np.where(predicted, ids, ~ids)
        last = ids[np.flatnonzero(starts < len(text.rstrip()))[-1:]]
        separator = self._tokenizer.separator
        if np.isin(last, [separator, ~separator]).all():
            return ids
        return np.append(ids, np.int32(~separator))

    def _spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Returns where the assistant's turns begin and end in the text."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendered(messages[:index], True)
            end = self._end(text, len(before), message["content"])
            if not text.startswith(before) or end is None:
                raise ValueError(
                    f"message {index + 1}: the chat template does not render the "
                    "assistant's text as it is after the messages before it, so that "
                    "its part is not known."
                )
            spans.append((len(before), end))
        return spans

    def _end(self, text: str, start: int, content: str) -> int | None:
        """Returns where a turn ends: after its text and the token that follows."""
        # Templates set thoughts anew, and leave out those of earlier turns.
        for part in (content.strip(), content.rpartition("</think>")[2].strip()):
            for end in (self._turn_end, ""):
                found = re.compile(re.escape(part) + end).search(text, start)
                if part and found:
                    return found.end()
        return None

    def _rendered(self, messages: Sequence[Message], ask: bool) -> str:
        try:
            return self._render(messages, ask)
        except Exception as error:  # templates raise what they like
            raise ValueError(f"the chat template refuses it: {error}") from None


def _check_messages(messages: Sequence[Any]) -> None:
    """Refuses messages without text, or without one of the assistant."""
    wrong = [
        str(number) for number, message in enumerate(messages, 1) if not _said(message)
    ]
    roles = [m.get("role") for m in messages if isinstance(m, Mapping)]
    schema.require(
        (len(messages) > 0, "has no messages."),
        (
            not wrong,
            "messages need `role` and `content`, texts that are not empty, which these "
            f"have not: {', '.join(wrong[:10])}.",
        ),
        (
            not messages or "assistant" in roles,
            "has no message of the role assistant to learn from.",
        ),
    )


def _said(message: Any) -> bool:
    """Tells whether a message has a role and a text."""
    return isinstance(message, Mapping) and all(
        isinstance(text, str) and text.strip()
        for text in (message.get("role"), message.get("content"))
    )


def _template_of(path: Path) -> Render:
    """Returns the chat template beside a `tokenizer.json`, by transformers."""
    transformers, _ = load_packages("transformers", "jinja2", extra="chat")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path.parent, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path.parent}: no tokenizer of transformers: {error}"
        ) from None
    if not tokenizer.chat_template:
        raise ValueError(f"{path}: has no chat template. {_NO_TEMPLATE}.")
    return lambda messages, ask: tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=ask
    )
