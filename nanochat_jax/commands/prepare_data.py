"""`nanochat-jax prepare-data`: a tokenizer trained on text, and its tokens."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress

from nanochat_jax.commands.shared import say, usage_errors
from nanochat_jax.config import schema
from nanochat_jax.lm.data import bpe, dataset_folder, documents


@dataclasses.dataclass(frozen=True)
class PrepareData:
    """Trains a byte-level BPE tokenizer on text, and writes the tokens of the text.

    Writes `tokenizer.json`, `tokens.bin` (raw little-endian uint32) and
    `tokens.bin.json`, all of them or none. Validation text, a twentieth, comes last.

    Attributes:
      output: Folder to write.
      vocab_size: Most tokens of the vocabulary: bytes, merges and <|endoftext|>.
      text: Files and folders of UTF-8 text.
      dataset: In place of `text`: the sources of Python's standard library.
      force: Whether to replace these files in a folder that is not empty.
    """

    output: str
    vocab_size: int
    text: tuple[str, ...] = ()
    dataset: Literal["stdlib"] | None = None
    force: bool = False

    def run(self) -> None:
        """Writes the folder and prints how to train on it."""
        console = Console()
        with usage_errors():
            self._check()
            if self.text:
                texts = documents.text_documents(self.text)
            else:
                texts = documents.stdlib_documents()
            done = dataset_folder.build_dataset(
                self.output,
                texts,
                self.vocab_size,
                force=self.force,
                track=lambda texts, task: _track(console, texts, task),
            )
        folder = Path(self.output)
        say(
            console,
            f"Wrote {folder}: {done.tokens:,} tokens of {len(texts):,} documents, the "
            f"last {done.held_out:,} held out; vocabulary {done.vocab_size:,}, "
            f"{done.bytes_per_token:.2f} bytes a token.\n"
            f"Train on them with: --dataset tokens --data-path {folder / 'tokens.bin'} "
            f"--tokenizer {folder / 'tokenizer.json'} --vocab-size {done.vocab_size}",
        )

    def _check(self) -> None:
        """Refuses invalid flags, before anything is read."""
        schema.require(
            (
                bool(self.text) != bool(self.dataset),
                "give either `--text PATH...` or `--dataset stdlib`.",
            ),
            bpe.vocab_check(self.vocab_size),
        )
        dataset_folder.check_folder(Path(self.output), self.force)


def _track(console: Console, texts: Sequence[str], task: str) -> Iterable[str]:
    """Returns documents that show a bar on a terminal, one line elsewhere."""
    if not console.is_terminal:
        say(console, f"{task}: {len(texts):,} documents")
        return texts
    return _bar(console, texts, task)


def _bar(console: Console, texts: Sequence[str], task: str) -> Iterator[str]:
    with Progress(console=console) as progress:
        yield from progress.track(texts, description=task)
