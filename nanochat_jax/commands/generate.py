"""`nanochat-jax generate`: text from a checkpoint."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from nanochat_jax.commands.shared import usage_errors
from nanochat_jax.config import schema
from nanochat_jax.lm.checkpoints import load_trained
from nanochat_jax.lm.data import cut_at, decode_stream
from nanochat_jax.lm.model import generate
from nanochat_jax.lm.runtime import device


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continues a prompt with a trained model, and prints the text as it is made.

    The same flags give the same text. It ends where the model ends the document.

    Attributes:
      checkpoint: Checkpoint folder of a run, or the folder of one of its steps.
      prompt: What the text begins with; if not given, a document begins.
      max_tokens: Most tokens to make; as many as fit the context if not given.
      temperature: How even the choice is; 0 always takes the likeliest token.
      top_k: How many of the likeliest tokens to choose from; all if not given.
      seed: Seed of the choice.
      stop: Texts to stop at; they are not printed.
      tokenizer: Where the tokenizer of the run is, if not where it was.
      device: Where to compute. `gpu` without a GPU is an error.
      threads: Processors to use on the CPU; all if not given.
    """

    checkpoint: str
    prompt: str = ""
    max_tokens: int | None = None
    temperature: float = 0.8
    top_k: int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    tokenizer: str | None = None
    device: Literal["auto", "cpu", "gpu"] = "auto"
    threads: int | None = None

    def run(self) -> None:
        """Prints the prompt and what follows."""
        with usage_errors():
            self._check()
            device.use(self.device, self.threads)
            pieces = self._pieces()
        print(self.prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()

    def _check(self) -> None:
        schema.require(
            (
                0 <= self.seed < 2**32,
                f"`--seed` must be from 0 to 2**32 - 1, got {self.seed}.",
            ),
            (all(self.stop), "`--stop` must not be an empty text."),
        )

    def _pieces(self) -> Iterator[str]:
        """Returns the text to come; what it needs is loaded and checked."""
        trained = load_trained(self.checkpoint)
        tokenizer = trained.load_tokenizer(self.tokenizer)
        prompt = tokenizer.encode(self.prompt).tolist() or [tokenizer.separator]
        room = max(trained.config.max_seq_len - len(prompt), 1)
        tokens = generate(
            trained.graphdef,
            trained.params,
            trained.config,
            prompt,
            max_tokens=room if self.max_tokens is None else self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
            stop=[tokenizer.separator],
        )
        return cut_at(decode_stream(tokenizer, tokens, prompt), self.stop)
