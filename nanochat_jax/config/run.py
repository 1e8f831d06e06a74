"""All settings of a run: the model's, the optimizer's and those of its training."""

import dataclasses
from typing import Literal

from nanochat_jax.config import schema
from nanochat_jax.config.base import RUN_KEYS
from nanochat_jax.config.model import ModelConfig
from nanochat_jax.config.optimizer import OptimizerConfig

DatasetName = Literal["stdlib", "text", "tokens", "synthetic"]
TokenDtype = Literal["uint16", "uint32"]

MESH_AXES = ("data", "fsdp", "tensor")
"""Axes of a mesh of devices: replicas, parts of their parameters, parts of layers."""


@dataclasses.dataclass(frozen=True)
class Config(OptimizerConfig, ModelConfig):
    """All settings of a run: the model's, the optimizer's and these of its training.

    Attributes:
      dataset: What to train on; see `corpus.load_corpus`.
      data_path: File or folders of the data sets `text` and `tokens`.
      token_dtype: Type of the ids in a token file that does not say it.
      tokenizer: File of a trained tokenizer; bytes if not given.
      batch_size: Sequences of a microbatch.
      grad_accum_steps: Microbatches whose gradients are averaged in a step.
      seq_len: Tokens of a sequence; `max_seq_len` if not given.
      mesh: Devices along each axis of a mesh of all there are, such as `{fsdp = 8}`:
        `data` and `fsdp` divide the sequences of a microbatch, `fsdp` also parameters
        and state, `tensor` heads and hidden units. One device is used if not given.
      log_interval: Steps between two lines of metrics.
      measure_optimizer: Whether the optimizer's share of a step is measured, at the
        first five lines of metrics. It takes the time of six more passes and of
        compiling one, and changes no number.
      eval_interval: Steps between two evaluations; there is one at the start and one
        at the end. 0 leaves only these.
      eval_batches: Batches of an evaluation, spread evenly over the held-out tokens.
      checkpoint_interval: Steps between two checkpoints; there is one at the end.
      keep_last_checkpoints: Checkpoints to keep.
      keep_checkpoint_every: Steps between two checkpoints that are kept for good, a
        multiple of `checkpoint_interval`; no others are kept if not given.
      max_skipped_steps: Steps in a row that may be skipped before the run stops. A
        step is skipped if its loss or its gradient is not finite.
      spike_skip: Standard deviations above their running mean from which on a loss or
        a gradient norm has its step skipped too, after the first 128; 0 skips none.
      sample_interval: Steps between two samples of text; 0 leaves the one at the end.
      sample_tokens: Tokens of text in a sample.
      sample_prompt: What the text begins with.
    """

    dataset: DatasetName = "stdlib"
    data_path: tuple[str, ...] = ()
    token_dtype: TokenDtype | None = None
    tokenizer: str | None = None
    batch_size: int = 8
    grad_accum_steps: int = 1
    seq_len: int | None = None
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    log_interval: int = 10
    measure_optimizer: bool = False
    eval_interval: int = 100
    eval_batches: int = 16
    checkpoint_interval: int = 500
    keep_last_checkpoints: int = 3
    keep_checkpoint_every: int | None = None
    max_skipped_steps: int = 10
    spike_skip: float = 0.0
    sample_interval: int = 0
    sample_tokens: int = 200
    sample_prompt: str = "def "

    def _checks(self) -> list[schema.Check]:
        at_least = {
            "batch_size": 1, "grad_accum_steps": 1, "log_interval": 1,
            "eval_interval": 0, "eval_batches": 1, "checkpoint_interval": 1,
            "keep_last_checkpoints": 1, "keep_checkpoint_every": 1,
            "max_skipped_steps": 1, "spike_skip": 0,
            "sample_interval": 0, "sample_tokens": 0,
        }  # fmt: skip
        return [
            *ModelConfig._checks(self),
            *OptimizerConfig._checks(self),
            *schema.lower_bounds(self, at_least),
            (
                {*self.mesh} <= {*MESH_AXES} and min(self.mesh.values(), default=1) > 0,
                f"`mesh` must give at least 1 device to axes of {[*MESH_AXES]}, got "
                f"{self.mesh}.",
            ),
            (
                1 <= self.sequence <= self.max_seq_len,
                "`seq_len` must lie between 1 and `max_seq_len`, got "
                f"{self.sequence} and {self.max_seq_len}.",
            ),
            (
                (self.keep_checkpoint_every or 0) % max(self.checkpoint_interval, 1)
                == 0,
                "`keep_checkpoint_every` must be a multiple of `checkpoint_interval`, "
                f"got {self.keep_checkpoint_every} and {self.checkpoint_interval}.",
            ),
        ]

    @property
    def sequence(self) -> int:
        """Tokens of a training sequence."""
        return self.max_seq_len if self.seq_len is None else self.seq_len

    @property
    def accumulates_low_rank(self) -> bool:
        """Whether gradients are accumulated as GaLore projects them.

        Only where the update hangs on nothing else: without residual, without clipping
        or skipping by the norm of the whole, and if all matrices change their basis
        together.
        """
        together = not (self.galore_stagger or self.galore_adaptive)
        published = self.use_galore and self.galore_residual == 0 and together
        without_norm = self.grad_clip == 0 and self.spike_skip == 0
        return published and self.grad_accum_steps > 1 and without_norm

    @property
    def tokens_per_step(self) -> int:
        """Tokens a step predicts."""
        return self.grad_accum_steps * self.batch_size * self.sequence


RUN_KEYS.update(field.name for field in dataclasses.fields(Config))
