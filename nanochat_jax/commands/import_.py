"""`nanochat-jax import`: a checkpoint from weights of other tools."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

from nanochat_jax.commands.shared import usage_errors

if TYPE_CHECKING:
    from nanochat_jax.lm.checkpoints import Source


@dataclasses.dataclass(frozen=True)
class Import:
    """Writes a checkpoint of weights alone, with their tokenizer.

    `generate`, `export` and `train --init-from` read it. `train --resume` needs the
    state of an optimizer, which it has not.

    Attributes:
      source: Hugging Face folder, file of weights that `export` wrote, or checkpoint.
      output: Checkpoint folder to write; it must be new or empty.
      param_dtype: Type of the parameters; that of the settings, float32 for Hugging
        Face folders, if not given.
      end_token: Token that ends a document; derived from the tokenizer's files if not
        given.
    """

    source: Annotated[str, "--from"]
    output: str
    param_dtype: Literal["float32", "bfloat16"] | None = None
    end_token: str | None = None

    def run(self) -> None:
        """Writes the checkpoint and prints what it contains."""
        from nanochat_jax.lm.checkpoints import write_imported
        from nanochat_jax.lm.runtime import machine

        with usage_errors():
            machine.use_device("cpu")
            source = self._source()
            count = write_imported(source, self.output)
        tokenizer = source.tokenizer_file or source.fingerprint or "unknown"
        also = " --tokenizer FILE" if source.fingerprint is None else ""
        print(
            f"Wrote {self.output}: {count:,} parameters in {source.config.param_dtype} "
            f"of the {source.kind} {source.path}; tokenizer: {tokenizer}.\n"
            f"Try `nanochat-jax generate --checkpoint {self.output}{also}`, or train "
            f"on, `nanochat-jax train --init-from {self.output}`."
        )

    def how_to_go_on(self) -> str:
        """Returns what an interrupted command left."""
        return "Nothing was written; the same command starts anew."

    def _source(self) -> "Source":
        """Returns the model, with what the flags change."""
        from nanochat_jax.lm.checkpoints import open_source

        source = open_source(self.source)
        if self.param_dtype is not None:
            config = dataclasses.replace(source.config, param_dtype=self.param_dtype)
            source = dataclasses.replace(source, config=config)
        if self.end_token is not None:
            source = dataclasses.replace(source, end_token=self.end_token)
        return source
