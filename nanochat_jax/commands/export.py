"""`nanochat-jax export`: the weights of a checkpoint, for other tools."""

import dataclasses
from typing import Literal

import optax

from nanochat_jax.commands.shared import usage_errors
from nanochat_jax.config import schema
from nanochat_jax.lm import huggingface
from nanochat_jax.lm.checkpoints import load_trained, weights_file
from nanochat_jax.lm.model import gpt
from nanochat_jax.lm.runtime import machine, require_writable


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes the weights of a checkpoint as safetensors, or as a Hugging Face folder.

    The format `safetensors` has a JSON file beside the weights, with `.json` for
    `.safetensors`: settings of the model, fingerprint of its tokenizer, its step, and
    versions. Of a ternary model it writes the latent weights, which the model rounds
    in use. The format `hf` is a folder with settings, weights and tokenizer, which
    `AutoModelForCausalLM.from_pretrained` of transformers loads.

    Attributes:
      checkpoint: Checkpoint folder of a run, or the folder of one of its steps.
      output: File to write, whose name ends in `.safetensors`; or with `hf` a folder,
        new or empty.
      format: What to write.
      dtype: Type of the weights in a folder; that of the checkpoint if not given.
      tokenizer: Path of the tokenizer, for a folder, if it was moved since the
        training, or if the model was trained on ids of an unknown one.
      latent: Whether a ternary model may be written to a folder, as its latent
        weights: the model there does not round them, and has other logits.
    """

    checkpoint: str
    output: str
    format: Literal["safetensors", "hf"] = "safetensors"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    tokenizer: str | None = None
    latent: bool = False

    def run(self) -> None:
        """Writes the files and prints what they contain."""
        if self.format == "hf":
            self._write_folder()
        else:
            self._write_file()

    def _write_file(self) -> None:
        with usage_errors():
            self._check_flags()
            path = weights_file.check_path(self.output)
            require_writable(files=[path, weights_file.config_path(path)])
            machine.use_device("cpu")
            trained = load_trained(self.checkpoint)
        weights_file.save(
            self.output,
            trained.config,
            trained.params,
            step=trained.step,
            tokenizer=trained.fingerprint,
        )
        count = optax.tree.size(gpt.without_padding(trained.config, trained.params))
        print(
            f"Wrote {self.output}, {count:,} parameters of step {trained.step}, and "
            f"{weights_file.config_path(self.output)}, their settings."
        )
        if trained.config.ternary:
            print("The kernels are the latent weights, which the model rounds itself.")

    def _check_flags(self) -> None:
        """Refuses flags of the other format."""
        given = {"--dtype": self.dtype, "--tokenizer": self.tokenizer}
        named = [flag for flag, value in given.items() if value is not None]
        named += ["--latent"] * self.latent
        schema.require(
            (not named, f"{', '.join(named)}: only for `--format hf`. Leave out.")
        )

    def _write_folder(self) -> None:
        with usage_errors():
            machine.use_device("cpu")
            trained = load_trained(self.checkpoint)
            huggingface.check_writable(
                self.output, trained.config, latent=self.latent, dtype=self.dtype
            )
            trained.load_tokenizer(self.tokenizer)  # refuses another, or none
            huggingface.write_folder(
                self.output,
                trained.config,
                trained.params,
                tokenizer=self.tokenizer or trained.tokenizer_file,
                end_token=trained.end_token,
                dtype=self.dtype,
                latent=self.latent,
            )
        count = optax.tree.size(gpt.without_padding(trained.config, trained.params))
        print(
            f"Wrote {self.output}, a folder for transformers: {count:,} parameters of "
            f"step {trained.step}, their settings and tokenizer."
        )
        if trained.config.ternary:
            print("The model there does not round the weights: its logits are others.")
