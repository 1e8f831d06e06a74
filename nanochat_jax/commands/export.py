"""`nanochat-jax export`: the weights of a checkpoint, for other tools."""

import dataclasses

import optax

from nanochat_jax.commands.shared import usage_errors
from nanochat_jax.lm.checkpoints import load_trained, weights_file
from nanochat_jax.lm.runtime import machine


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes the weights of a checkpoint as safetensors, with a JSON file beside them.

    The JSON file, with `.json` for `.safetensors`, has the settings of the model, the
    fingerprint of its tokenizer, its step, and versions. Of a ternary model it writes
    the latent weights, which the model rounds in use.

    Attributes:
      checkpoint: Checkpoint folder of a run, or the folder of one of its steps.
      output: File to write; its name ends in `.safetensors`.
    """

    checkpoint: str
    output: str

    def run(self) -> None:
        """Writes both files and prints what they contain."""
        with usage_errors():
            weights_file.check_path(self.output)
            machine.use_device("cpu")
            trained = load_trained(self.checkpoint)
        weights_file.save(
            self.output,
            trained.config,
            trained.params,
            step=trained.step,
            tokenizer=trained.fingerprint,
        )
        count = optax.tree.size(trained.params)
        print(
            f"Wrote {self.output}, {count:,} parameters of step {trained.step}, and "
            f"{weights_file.config_path(self.output)}, their settings."
        )
        if trained.config.ternary:
            print("The kernels are the latent weights, which the model rounds itself.")
