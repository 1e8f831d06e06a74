"""All settings of a run, one flat TOML file: the model's, the optimizer's, training's.

A file may hold any of the keys, and each class reads its own from it.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Literal, Self

from nanochat_jax import settings
from nanochat_jax.coefficients import POLYNOMIALS
from nanochat_jax.linalg import NewtonSchulzDtype

DatasetName = Literal["stdlib", "text", "tokens", "synthetic"]
TokenDtype = Literal["uint16", "uint32"]

# Keys of the parent project, nanochat-rs-ternary, for parts that are not built here.
PARENT_ONLY = (
    "distill_kl_weight",
    "group_size",
    "loop_scale_penalty",
    "mhc_lr",
    "mhc_n_streams",
)

HARDWARE_RANKS = {"a": 512, "b": 256, "c": 384}
"""GaLore rank by the parent project's hardware presets."""

_DEFAULT_RANK = 256
_FALLBACK_LR = {"adamw": 3e-3, "lion": 3e-4}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What optimizer to build; the keys are those of a TOML file.

    Attributes:
      lr: Peak learning rate of the matrices.
      fallback: Optimizer of embeddings, head and vectors.
      fallback_lr: Its peak learning rate; 0.003 for AdamW and 0.0003 for Lion if not
        given.
      weight_decay: Decoupled weight decay of everything but vectors.
      warmup_steps: Steps of linear warm-up.
      total_steps: Steps of the schedule.
      decay_start_frac: Fraction of the steps after which the rate falls linearly to 0.
      grad_clip: Largest global norm of the gradient; 0 does not clip.
      muon_momentum: Decay of the momentum of matrices.
      muon_scale: Shape rule of their updates, as in `scale_by_shape`.
      ns_method: Newton-Schulz polynomials, by their name in `POLYNOMIALS`.
      ns_steps: Newton-Schulz steps.
      ns_dtype: Type of the iteration; "auto" is bfloat16 where it is native.
      use_8bit_optim: Whether the momentum of matrices is stored quantised.
      quant_bits: Bits of its codes.
      quant_block_size: Entries that share a scale.
      quant_scale_dtype: Type of the scales.
      quant_min_size: Arrays with fewer entries are not quantised.
      stochastic_rounding: Whether it is rounded stochastically.
      use_galore: Whether the momentum of matrices is kept in a low-rank space.
      galore_rank: Its rank; by `hardware`, else 256, if not given.
      hardware: Preset that gives the rank: 512 for "a", 256 for "b", 384 for "c".
      galore_update_freq: Steps between two changes of its basis.
      galore_stagger: Whether matrices change their basis at different steps.
      galore_residual: Weight of the rest of the gradient; 0 is the published method.
      projector_bits: Bits of the stored basis; 4 with `use_8bit_optim`, else 8, if not
        given.
      adam_betas: Decays of AdamW.
      lion_betas: Decays of Lion.
      seed: Seed of sketches and stochastic rounding.
    """

    lr: float = 0.02
    fallback: Literal["adamw", "lion"] = "adamw"
    fallback_lr: float | None = None
    weight_decay: float = 0.0
    warmup_steps: int = 0
    total_steps: int = 1000
    decay_start_frac: float = 0.8
    grad_clip: float = 1.0
    muon_momentum: float = 0.95
    muon_scale: Literal["width", "rms", "none"] = "width"
    ns_method: str = "quintic"
    ns_steps: int = 5
    ns_dtype: NewtonSchulzDtype = "auto"
    use_8bit_optim: bool = False
    quant_bits: Literal[8, 4] = 8
    quant_block_size: int = 128
    quant_scale_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quant_min_size: int = 4096
    stochastic_rounding: bool = False
    use_galore: bool = False
    galore_rank: int | None = None
    hardware: Literal["a", "b", "c"] | None = None
    galore_update_freq: int = 200
    galore_stagger: bool = False
    galore_residual: float = 1.0
    projector_bits: Literal[32, 16, 8, 4] | None = None
    adam_betas: tuple[float, float] = (0.9, 0.95)
    lion_betas: tuple[float, float] = (0.9, 0.99)
    seed: int = 0

    def __post_init__(self) -> None:
        settings.check_types(self)
        settings.require(*self._checks())

    def _checks(self) -> list[settings.Check]:
        at_least = {
            "warmup_steps": 0, "total_steps": 1, "grad_clip": 0, "ns_steps": 1,
            "quant_block_size": 1, "quant_min_size": 0, "galore_rank": 1,
            "galore_update_freq": 1, "galore_residual": 0, "weight_decay": 0, "lr": 0,
            "fallback_lr": 0, "seed": 0,
        }  # fmt: skip
        fractions = {
            "muon_momentum": [self.muon_momentum],
            "adam_betas": self.adam_betas,
            "lion_betas": self.lion_betas,
        }
        return [
            *settings.lower_bounds(self, at_least),
            *(
                (
                    all(0 <= b < 1 for b in betas),
                    f"`{name}` must lie in [0, 1), got {getattr(self, name)}.",
                )
                for name, betas in fractions.items()
            ),
            *_method_checks(self.ns_method, self.ns_steps),
            (self.seed < 2**32, f"`seed` must be below 2**32, got {self.seed}."),
            (
                0 <= self.decay_start_frac <= 1,
                f"`decay_start_frac` must lie in [0, 1], got {self.decay_start_frac}.",
            ),
            (
                self.warmup_steps <= self.decay_start,
                f"`warmup_steps` must end before the decay begins, at step "
                f"{self.decay_start} = decay_start_frac x total_steps, got "
                f"{self.warmup_steps}.",
            ),
        ]

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Reads the fields of this class from a TOML file.

        The file may have the keys of a whole run: those of the other classes here are
        left alone. Files of the parent project load as they are; their keys for parts
        that are not built here are named in one warning.

        Args:
          path: A flat TOML file.

        Returns:
          The settings.

        Raises:
          ValueError: If the file cannot be read, or a key or value is not allowed.
        """
        values = settings.read_toml(path)
        unbuilt = [key for key in PARENT_ONLY if key in values]
        if unbuilt:
            warnings.warn(
                f"{path}: these keys are for parts that are not built here and have no "
                f"effect: {', '.join(unbuilt)}.",
                stacklevel=2,
            )
        known = [field.name for field in dataclasses.fields(Config)]
        return settings.build(cls, values, str(path), [*known, *unbuilt])

    @property
    def decay_start(self) -> int:
        """Step at which the learning rate begins to fall."""
        return round(self.decay_start_frac * self.total_steps)

    @property
    def rank(self) -> int:
        """GaLore rank: `galore_rank`, else that of `hardware`, else 256."""
        preset = HARDWARE_RANKS[self.hardware] if self.hardware else _DEFAULT_RANK
        return self.galore_rank or preset

    @property
    def fallback_peak_lr(self) -> float:
        """Peak learning rate of embeddings, head and vectors."""
        given = self.fallback_lr
        return _FALLBACK_LR[self.fallback] if given is None else given

    @property
    def stored_projector_bits(self) -> int:
        """Bits of the stored basis: `projector_bits`, else by `use_8bit_optim`."""
        return self.projector_bits or (4 if self.use_8bit_optim else 8)

    @property
    def variant(self) -> str:
        """Short name of the Muon variant, such as `"galore_8bit"`."""
        base = "muon"
        if self.use_galore:
            base = "galore" if self.galore_residual else "galore_plain"
        return f"{base}_{self.quant_bits}bit" if self.use_8bit_optim else base


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of the GPT.

    Attributes:
      dim: Width of the residual stream, D.
      n_layers: Blocks, L.
      n_heads: Query heads, N; `dim / n_heads` is the even size of a head, H.
      n_kv_heads: Key and value heads, K; divides `n_heads`. `n_heads` if not given.
      ffn_mult: Hidden width of the feed-forward layer over `dim`.
      vocab_size: Tokens, V.
      max_seq_len: Longest sequence, in tokens.
      weight_tied: Whether the head is the transposed embedding.
      rope_theta: Base of the rotary frequencies.
      compute_dtype: Type of activations and products; parameters are float32.
      remat: Whether blocks are recomputed in the backward pass.
    """

    dim: int = 256
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None
    ffn_mult: float = 2.6875
    vocab_size: int = 256
    max_seq_len: int = 512
    weight_tied: bool = True
    rope_theta: float = 10_000.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        settings.check_types(self)
        settings.require(*self._checks())

    def _checks(self) -> list[settings.Check]:
        sizes = ("dim", "n_layers", "n_heads", "vocab_size", "max_seq_len")
        heads = max(self.n_heads, 1)
        return [
            *settings.lower_bounds(self, dict.fromkeys(sizes, 1)),
            (
                self.dim % heads == 0 and self.dim // heads % 2 == 0,
                "`dim` must be an even multiple of `n_heads`, got "
                f"{self.dim} and {self.n_heads}.",
            ),
            (
                self.kv_heads >= 1 and self.n_heads % self.kv_heads == 0,
                "`n_heads` must be a multiple of `n_kv_heads`, got "
                f"{self.n_heads} and {self.kv_heads}.",
            ),
            (
                self.ffn_dim >= 1 or self.dim < 1,
                f"`ffn_mult` must give a hidden width, `dim` x `ffn_mult`, of at "
                f"least 1, got {self.ffn_mult}.",
            ),
            (
                self.rope_theta > 0,
                f"`rope_theta` must be positive, got {self.rope_theta}.",
            ),
        ]

    @property
    def head_dim(self) -> int:
        """Size of a head, H."""
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads, K."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the feed-forward layer, F."""
        return round(self.dim * self.ffn_mult)


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
      log_interval: Steps between two lines of metrics.
      eval_interval: Steps between two evaluations; there is one at the start and one
        at the end. 0 leaves only these.
      eval_batches: Batches of an evaluation, spread evenly over the held-out tokens.
      checkpoint_interval: Steps between two checkpoints; there is one at the end.
      keep_last_checkpoints: Checkpoints to keep.
      sample_tokens: Tokens of text to generate at the end.
      sample_prompt: What the generated text begins with.
    """

    dataset: DatasetName = "stdlib"
    data_path: tuple[str, ...] = ()
    token_dtype: TokenDtype | None = None
    tokenizer: str | None = None
    batch_size: int = 8
    grad_accum_steps: int = 1
    seq_len: int | None = None
    log_interval: int = 10
    eval_interval: int = 100
    eval_batches: int = 16
    checkpoint_interval: int = 500
    keep_last_checkpoints: int = 3
    sample_tokens: int = 200
    sample_prompt: str = "def "

    def _checks(self) -> list[settings.Check]:
        at_least = {
            "batch_size": 1, "grad_accum_steps": 1, "log_interval": 1,
            "eval_interval": 0, "eval_batches": 1, "checkpoint_interval": 1,
            "keep_last_checkpoints": 1, "sample_tokens": 0,
        }  # fmt: skip
        return [
            *ModelConfig._checks(self),
            *OptimizerConfig._checks(self),
            *settings.lower_bounds(self, at_least),
            (
                1 <= self.sequence <= self.max_seq_len,
                "`seq_len` must lie between 1 and `max_seq_len`, got "
                f"{self.sequence} and {self.max_seq_len}.",
            ),
        ]

    @property
    def sequence(self) -> int:
        """Tokens of a training sequence."""
        return self.max_seq_len if self.seq_len is None else self.seq_len

    @property
    def tokens_per_step(self) -> int:
        """Tokens a step predicts."""
        return self.grad_accum_steps * self.batch_size * self.sequence


def _method_checks(method: str, steps: int) -> list[settings.Check]:
    known = POLYNOMIALS.get(method)
    if known is None:
        return [
            (False, f"`ns_method` must be one of {[*POLYNOMIALS]}, got {method!r}.")
        ]
    most = len(known.coefficients)
    allowed = steps <= most or known.repeats
    message = f"`ns_steps` must be at most {most} for {method!r}, got {steps}."
    return [(allowed, message)]
