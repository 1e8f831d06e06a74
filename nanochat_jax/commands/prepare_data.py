"""`nanochat-jax prepare-data`: a tokenizer trained on text, and its tokens."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from nanochat_jax.commands.shared import say, usage_errors
from nanochat_jax.config import schema


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
        from nanochat_jax.lm.data import dataset_folder, documents

        console = Console()
        with usage_errors():
            self._check()
            if self.text:
                texts = documents.text_documents(self.text)
            else:
                texts = documents.stdlib_documents()
            with _tracker(console) as track:
                done = dataset_folder.build_dataset(
                    self.output, texts, self.vocab_size, force=self.force, track=track
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

    def how_to_go_on(self) -> str:
        """Returns what an interrupted command left."""
        return "Nothing was written; the same command starts anew."

    def _check(self) -> None:
        """Refuses invalid flags, before anything is read."""
        from nanochat_jax.lm.data import bpe, dataset_folder
        from nanochat_jax.lm.runtime import require_writable

        schema.require(
            (
                bool(self.text) != bool(self.dataset),
                "give either `--text PATH...` or `--dataset stdlib`.",
            ),
            bpe.vocab_check(self.vocab_size),
        )
        dataset_folder.check_folder(Path(self.output), self.force)
        require_writable(folders=[self.output])


@contextlib.contextmanager
def _tracker(console: Console) -> Iterator[Callable[..., Iterable[str]]]:
    """Yields a function from documents and a task to documents that show progress.

    A terminal gets a bar for each task, which is closed with the block; elsewhere each
    task is a line.
    """
    from rich.progress import Progress

    def tell(texts: Sequence[str], task: str) -> Iterable[str]:
        say(console, f"{task}: {len(texts):,} documents")
        return texts

    if not console.is_terminal:
        yield tell
        return
    with Progress(console=console) as progress:
        yield lambda texts, task: progress.track(texts, description=task)
