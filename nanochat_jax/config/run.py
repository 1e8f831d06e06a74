"""All settings of a run: of its model, its optimizer and its training."""

import dataclasses
import functools
from typing import Literal, cast

from nanochat_jax.config import schema
from nanochat_jax.config.byte_sizes import parse_bytes
from nanochat_jax.config.model import ModelConfig
from nanochat_jax.config.optimizer import OptimizerConfig
from nanochat_jax.config.schema import setting

DatasetName = Literal["stdlib", "text", "tokens", "jsonl", "parquet", "synthetic"]
TokenDtype = Literal["uint8", "uint16", "uint32", "int32", "int64"]
TokenFormat = Literal["raw", "llm.c", "npy", "datatrove", "megatron"]

MESH_AXES = ("data", "fsdp", "tensor")
"""Axes of a mesh: data parallel, fully sharded data parallel, tensor parallel."""

_data = functools.partial(setting, group="Data")
_batches = functools.partial(setting, group="Batches")
_metrics = functools.partial(setting, group="Metrics and evaluations", affects="course")
_checkpoints = functools.partial(setting, group="Checkpoints", affects="nothing")
_skipping = functools.partial(setting, group="Steps that are skipped", affects="course")
_clipping = functools.partial(
    setting, group="Attention scores of models without QK-norm", affects="course"
)
_samples = functools.partial(setting, group="Samples of text", affects="nothing")


@dataclasses.dataclass(frozen=True)
class Config(OptimizerConfig, ModelConfig):
    """All settings of a run: of its model, its optimizer and its training.

    Attributes:
      total_steps: Steps of the run, at whose end the learning rate has fallen.
      lr: Peak learning rate of the matrices.
      fallback_lr: Peak learning rate of embeddings, head and vectors; 0.003 for AdamW
        and 0.0003 for Lion if not given.
      dataset: Data set to train on; see `corpus.load_corpus`.
      data_path: Files and folders of a data set of files; but for `text` also patterns,
        such as `shards/*.bin`.
      text_field: Field of `jsonl` and `parquet` with the text of a record, or with its
        messages, of which then only the assistant's are learned.
      token_dtype: Type of the ids in token files that do not record it; uint32 if not
        given.
      token_format: Format of token files; recognised if not given.
      tokenizer: File of a trained tokenizer; bytes if not given.
      end_token: Token of `tokenizer` that ends a document; derived from the file and
        the `tokenizer_config.json` beside it if not given.
      init_from: Model to start from: a Hugging Face folder, a checkpoint, or a file
        that `export` wrote. Settings of the model, and the tokenizer, are then its own
        where they are not given; of a checkpoint only the parameters are taken.
      batch_size: Sequences of a microbatch.
      grad_accum_steps: Microbatches whose gradients are averaged in a step.
      seq_len: Tokens of a sequence; `max_seq_len` if not given.
      mesh: Devices along each axis of a mesh of all devices, such as `{fsdp = 8}`:
        `data` and `fsdp` divide the sequences of a microbatch, `fsdp` also parameters
        and state, `tensor` heads and hidden units. One device is used if not given.
      update_in_backward: Whether each layer is updated in the backward pass, as soon as
        it has its gradient, so that gradients of one layer exist at a time. Blocks are
        stacked, as by `scan_layers`, and recomputed. `grad_clip` then applies to the
        gradient of each layer, and to those of embedding and head; `spike_skip` looks
        at the loss alone; a layer whose gradient is not finite is left as it is.
      remat_segment: Layers between two hidden states that are kept for the backward
        pass of `update_in_backward`; more than 1 takes one more forward pass.
      memory_limit: Most bytes of a training step on each device, such as "24GB" or
        "22.5 GiB". `train` refuses a step that is planned to take more; `plan` names
        settings that fit.
      log_interval: Steps between two lines of metrics.
      measure_optimizer: Whether the optimizer's share of a step is measured, at the
        first five lines of metrics. It takes the time of six more passes and of
        compiling one, and changes no number. Not with `update_in_backward`, where the
        optimizer has no time of its own.
      eval_interval: Steps between two evaluations, besides those at the start and at
        the end; 0 for only these two.
      eval_batches: Batches of an evaluation, spread evenly over the held-out tokens.
      average_share: Part of the average of weights in what is evaluated, sampled from
        and exported; the rest is the weights themselves, since averages lag.
      checkpoint_interval: Steps between two checkpoints, besides the one at the end.
      keep_last_checkpoints: Number of latest checkpoints to keep.
      keep_checkpoint_every: Steps between two checkpoints that are never deleted, a
        multiple of `checkpoint_interval`; only the latest are kept if not given.
      max_skipped_steps: Consecutive skips after which the run stops. A step is skipped
        if its loss or its gradient is not finite.
      spike_skip: Standard deviations above the running mean from which on a loss or a
        gradient norm has its step skipped too, after the first 128; 0 skips none.
      qk_clip: Largest attention score that is kept, such as 100, in a model without
        `qk_norm`: kernels of queries and keys of heads beyond it are scaled (QK-clip of
        MuonClip, arXiv:2507.20534); 0 clips none.
      qk_clip_interval: Steps between two looks at the scores, a forward pass each. The
        metric `largest_score` has the largest.
      sample_interval: Steps between two samples of text, besides the one at the end; 0
        for only that one.
      sample_tokens: Tokens of text in a sample.
      sample_prompt: Start of the text.
    """

    # A run has an end, and its settings are written to files.
    total_steps: int = setting(1000, group="Optimizer", least=1)
    lr: float = setting(0.02, group="Optimizer", least=0, adamw=True)
    fallback_lr: float | None = setting(None, group="Optimizer", least=0)
    dataset: DatasetName = _data("stdlib")  # noqa: RUF009
    # Other files or another tokenizer affect nothing if they give the same ids, which a
    # run compares by itself.
    data_path: tuple[str, ...] = _data((), affects="nothing")
    text_field: str = _data("text", affects="nothing")
    token_dtype: TokenDtype | None = _data(None)  # noqa: RUF009
    token_format: TokenFormat | None = _data(None, affects="nothing")  # noqa: RUF009
    tokenizer: str | None = _data(None, affects="nothing")
    end_token: str | None = _data(None, affects="nothing")
    init_from: str | None = setting(None, group="Model to start from", affects="course")
    batch_size: int = _batches(8, least=1)
    grad_accum_steps: int = _batches(1, least=1)
    seq_len: int | None = _batches(None)
    mesh: dict[str, int] = _batches(dict, affects="course")  # noqa: RUF009
    update_in_backward: bool = _batches(False, affects="course")
    remat_segment: int = _batches(
        1, least=1, affects="course", needs=("update_in_backward",)
    )
    memory_limit: str | None = _batches(None, affects="nothing")
    log_interval: int = _metrics(10, least=1)
    measure_optimizer: bool = _metrics(False)
    eval_interval: int = _metrics(100, least=0)
    eval_batches: int = _metrics(16, least=1)
    average_share: float = _metrics(0.6, least=0, needs=("average_horizon",))
    checkpoint_interval: int = _checkpoints(500, least=1)
    keep_last_checkpoints: int = _checkpoints(3, least=1)
    keep_checkpoint_every: int | None = _checkpoints(None, least=1)
    max_skipped_steps: int = _skipping(10, least=1)
    spike_skip: float = _skipping(0.0, least=0)
    qk_clip: float = _clipping(0.0, least=0)
    qk_clip_interval: int = _clipping(10, least=1, needs=("qk_clip",))
    sample_interval: int = _samples(0, least=0)
    sample_tokens: int = _samples(200, least=0)
    sample_prompt: str = _samples("def ")

    def _checks(self) -> list[schema.Check]:
        return [
            *ModelConfig._checks(self),
            *OptimizerConfig._checks(self),
            (
                {*self.mesh} <= {*MESH_AXES} and min(self.mesh.values(), default=1) > 0,
                f"`mesh` must give at least 1 device to axes of {[*MESH_AXES]}, got "
                f"{self.mesh}. An example: `--mesh data=2,fsdp=4`.",
            ),
            (
                self.scan_layers or not self.update_in_backward,
                "`update_in_backward` goes through stacked blocks. Set `scan_layers` "
                "to true.",
            ),
            (
                self.n_layers % max(self.remat_segment, 1) == 0,
                f"`remat_segment` must divide `n_layers`, {self.n_layers}, got "
                f"{self.remat_segment}.",
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
            (
                self.average_share <= 1,
                f"`average_share` must lie in [0, 1], got {self.average_share}.",
            ),
            (
                not self.qk_clip or self.qk_norm == "none",
                '`qk_clip` is for `qk_norm = "none"`: normalised queries and keys have '
                "bounded scores. Set one of them otherwise.",
            ),
            (
                not (self.qk_clip and self._keeps_low_bits),
                "`qk_clip` scales bfloat16 weights, whose low bits `weight_rounding = "
                '"split"` keeps apart. Take "stochastic" or weights in float32.',
            ),
            *self._limit_checks(),
        ]

    @property
    def _keeps_low_bits(self) -> bool:
        return self.param_dtype == "bfloat16" and self.weight_rounding == "split"

    def _limit_checks(self) -> list[schema.Check]:
        try:
            self.memory_limit_bytes  # noqa: B018
        except ValueError as error:
            return [(False, f"`memory_limit` {error}")]
        return []

    @property
    def sequence(self) -> int:
        """Tokens of a training sequence."""
        return self.max_seq_len if self.seq_len is None else self.seq_len

    @property
    def fallback_peak_lr(self) -> float:
        """Peak learning rate of embeddings, head and vectors."""
        return cast(float, super().fallback_peak_lr)

    @property
    def memory_limit_bytes(self) -> int | None:
        """Most bytes of a step on each device; `None` without a limit."""
        return None if self.memory_limit is None else parse_bytes(self.memory_limit)

    @property
    def tokens_per_step(self) -> int:
        """Tokens a step predicts."""
        return self.grad_accum_steps * self.batch_size * self.sequence
