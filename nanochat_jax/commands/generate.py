"""`nanochat-jax generate`: text from a checkpoint."""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Literal

from nanochat_jax.commands.shared import usage_errors
from nanochat_jax.config import schema


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continues a prompt with a trained model, and prints text as it is generated.

    The same flags give the same text. It ends where the model ends the document.

    Attributes:
      checkpoint: Checkpoint folder of a run, or the folder of one of its steps.
      prompt: Beginning of the text; a new document if not given.
      max_tokens: Most tokens to generate; as many as fit the context if not given.
      temperature: Divisor of the logits; 0 always takes the most likely token.
      top_k: Number of most likely tokens to sample from; all if not given.
      seed: Seed of the sampling.
      stop: Stop strings; they are not printed.
      tokenizer: Path of the tokenizer, if it was moved since the training, or if the
        model was trained on ids of an unknown one.
      device: Device to compute on. `gpu` without a GPU is an error.
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
        """Prints the prompt and its continuation."""
        from nanochat_jax.lm.runtime import machine

        with usage_errors():
            self._check()
            machine.use_device(self.device, self.threads)
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
        """Loads model and tokenizer, and returns the text piece by piece."""
        from nanochat_jax.lm.checkpoints import load_trained
        from nanochat_jax.lm.data import cut_at, decode_stream, up_to
        from nanochat_jax.lm.model import generate

        trained = load_trained(self.checkpoint)
        tokenizer = trained.load_tokenizer(self.tokenizer)
        if trained.fingerprint is None:
            print(
                "note: the model was trained on ids of an unknown tokenizer; they are "
                f"taken to be of {self.tokenizer or trained.tokenizer_file}.",
                file=sys.stderr,
            )
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
        )
        tokens = up_to(tokens, tokenizer.separator)
        return cut_at(decode_stream(tokenizer, tokens, prompt), self.stop)
