"""`nanochat-jax export`: the weights of a checkpoint for other tools."""

import dataclasses

import jax

from nanochat_jax.commands.shared import usage_errors
from nanochat_jax.lm.checkpoints import load_trained, weights_file
from nanochat_jax.lm.runtime import device


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes the weights of a checkpoint as safetensors, a JSON file beside them.

    The JSON file, with `.json` for `.safetensors`, has the settings of the model, the
    fingerprint of its tokenizer, its step, and the versions that wrote it. Of a ternary
    model the latent weights are written, which it rounds in use.

    Attributes:
      checkpoint: Checkpoint folder of a run, or the folder of one of its steps.
      output: File to write; its name ends in `.safetensors`.
    """

    checkpoint: str
    output: str

    def run(self) -> None:
        """Writes both files and says what is in them."""
        with usage_errors():
            weights_file.check_path(self.output)
            device.use("cpu")
            trained = load_trained(self.checkpoint)
        weights_file.save(
            self.output,
            trained.config,
            trained.params,
            step=trained.step,
            tokenizer=trained.fingerprint,
        )
        count = sum(x.size for x in jax.tree.leaves(trained.params))
        print(
            f"Wrote {self.output}, {count:,} parameters of step {trained.step}, and "
            f"{weights_file.config_path(self.output)}, their settings."
        )
        if trained.config.ternary:
            print("The kernels are the latent weights, which the model rounds itself.")
