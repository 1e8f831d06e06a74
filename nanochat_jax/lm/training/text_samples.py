"""Samples of text from a model in training."""

import numpy as np

from nanochat_jax.config import schema
from nanochat_jax.lm.data import up_to
from nanochat_jax.lm.model import Params, generate
from nanochat_jax.lm.training.run import Run

# Below 1, so that text of a little-trained model is more coherent.
_TEMPERATURE = 0.8


class Sampler:
    """Continues the prompt of a run with its parameters of the moment.

    Parameters, step and the run's seed determine the text. The first sample compiles,
    later ones reuse it.
    """

    def __init__(self, run: Run):
        """Encodes the prompt; nothing is compiled yet.

        Args:
          run: The run; `sample_prompt` and `sample_tokens` are read of its settings.

        Raises:
          ValueError: If the prompt leaves no room in the context.
        """
        self._run = run
        tokenizer, config = run.tokenizer, run.config
        prompt = tokenizer.encode(config.sample_prompt).tolist()
        self._prompt: list[int] = prompt or [tokenizer.separator]
        room = config.max_seq_len - len(self._prompt)
        schema.require(
            (
                room > 0,
                f"`sample_prompt` is {len(self._prompt)} tokens long, and must leave "
                f"room in a context of {config.max_seq_len}. Shorten it.",
            )
        )
        self._max_tokens = min(config.sample_tokens, room)

    def __call__(self, params: Params, step: int) -> str:
        """Returns the prompt and its continuation.

        Args:
          params: Parameters of the model.
          step: Steps done, so that each sample is another one.
        """
        config, tokenizer = self._run.config, self._run.tokenizer
        tokens = generate(
            self._run.graphdef,
            params,
            config,
            self._prompt,
            max_tokens=self._max_tokens,
            temperature=_TEMPERATURE,
            seed=_mixed(config.seed, step),
        )
        text = tokenizer.decode(list(up_to(tokens, tokenizer.separator)))
        return config.sample_prompt + _printable(text)


def make_sampler(run: Run) -> Sampler | None:
    """Returns a sampler, or nothing if the run is to show no text, or has none.

    Its data may be ids of another tokenizer, or of none, so that what they stand for is
    not known.

    Args:
      run: The run.

    Raises:
      ValueError: If the prompt leaves no room in the context.
    """
    known = run.corpus.tokenizer == run.tokenizer.fingerprint
    return Sampler(run) if known and run.config.sample_tokens else None


def _printable(text: str) -> str:
    """Returns text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _mixed(seed: int, step: int) -> int:
    """Returns a 32-bit seed from two numbers, unrelated to those of other steps."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
