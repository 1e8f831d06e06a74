"""Settings of the optimizer."""

import dataclasses
from typing import Literal

from nanochat_jax.config import schema
from nanochat_jax.config.base import Settings
from nanochat_jax.numerics import POLYNOMIALS, NewtonSchulzDtype
from nanochat_jax.transforms import Rank, check_rank

CodecName = Literal["int8", "dynamic8", "mulaw8", "float8"]

HARDWARE_RANKS = {"a": 512, "b": 256, "c": 384}
"""GaLore rank by the parent project's hardware presets."""

_DEFAULT_RANK = 256
_FALLBACK_LR = {"adamw": 3e-3, "lion": 3e-4}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Settings):
    """What optimizer to build; the keys are those of a TOML file.

    Attributes:
      lr: Peak learning rate of the matrices.
      fallback: Optimizer of embeddings, head and vectors.
      fallback_lr: Its peak learning rate; 0.003 for AdamW and 0.0003 for Lion if not
        given.
      weight_decay: Decoupled weight decay of everything but vectors.
      warmup_steps: Steps of linear warm-up.
      total_steps: Steps of the schedule.
      schedule: Course of the rate after its warm-up: "wsd" (warm-up, stable, decay; Hu
        et al. 2024, "MiniCPM") stays and then falls linearly, "cosine" falls along half
        a cosine (Loshchilov and Hutter 2017, "SGDR"), and "linear" along a line.
      decay_start_frac: Fraction of the steps after which "wsd" begins to fall.
      min_lr_frac: What the rate falls to, as a fraction of its peak.
      grad_clip: Largest global norm of the gradient; 0 does not clip.
      muon_momentum: Decay of the momentum of matrices.
      muon_scale: Shape rule of their updates, as in `scale_by_shape`.
      ns_method: Newton-Schulz polynomials, by their name in `POLYNOMIALS`.
      ns_steps: Newton-Schulz steps.
      ns_dtype: Type of the iteration; "auto" is bfloat16 where it is native.
      use_8bit_optim: Whether moments are stored quantised: the momentum of matrices,
        and with it the moments of AdamW or Lion in 8 bits.
      quantize_embeddings: Whether that holds for embeddings and head too.
      quant_bits: Bits of the momentum of matrices. 4 are `Normal4`, or `Int4` if
        rounding is stochastic; 2 are `Normal2`.
      quant_codec: How first moments are stored in 8 bits. Second moments, which are
        divided by, are always in the dynamic map without zero.
      quant_block_size: Entries that share a scale; half as many with `Normal4`.
      quant_scale_dtype: Type of the scales.
      quant_min_size: Arrays with fewer entries are not quantised.
      stochastic_rounding: Whether first moments are rounded stochastically, which only
        the evenly spaced levels of "int8" and 4 bits allow.
      use_galore: Whether the momentum of matrices is kept in a low-rank space.
      galore_rank: Its rank: a number, a fraction of the shorter side, or a table of
        these by part of the path, such as `{attention = 128, "*" = 0.25}`. By
        `hardware`, else 256, if not given.
      hardware: Preset that gives the rank: 512 for "a", 256 for "b", 384 for "c".
      galore_update_freq: Steps between two changes of its basis.
      galore_stagger: Whether matrices change their basis at different steps.
      galore_adaptive: Whether a matrix changes its basis early when it captures less
        of the gradient, and later when it stands still; see `Adaptive`.
      galore_warm_start: Whether a basis is looked for from the one before, not from a
        random sketch.
      galore_momentum_share: Share of the momentum in the matrix whose leading
        directions a basis is of; the rest of it is the gradient.
      galore_residual: Weight of the rest of the gradient; 0 is the published method.
      galore_rest_bits: Bits in which the rest has a momentum of its own: 2 and 4 are
        `Normal2` and `Normal4`, 8 `Int8`, 32 not quantised; 0 for none.
      galore_rest_momentum: Decay of that momentum; short, as few bits ask for.
      galore_match_norm: Whether the rest is scaled as the momentum is to the gradient.
      galore_scale: Factor on what comes back from the low-rank space.
      projector_bits: Bits of the stored basis; 4 with `use_8bit_optim`, else 8, if not
        given.
      adam_betas: Decays of AdamW.
      lion_betas: Decays of Lion.
      seed: Seed of sketches and stochastic rounding; in a run also of the parameters
        and of the order of the data.
    """

    lr: float = 0.02
    fallback: Literal["adamw", "lion"] = "adamw"
    fallback_lr: float | None = None
    weight_decay: float = 0.0
    warmup_steps: int = 0
    total_steps: int = 1000
    schedule: Literal["wsd", "cosine", "linear"] = "wsd"
    decay_start_frac: float = 0.8
    min_lr_frac: float = 0.0
    grad_clip: float = 1.0
    muon_momentum: float = 0.95
    muon_scale: Literal["width", "rms", "none"] = "width"
    ns_method: str = "quintic"
    ns_steps: int = 5
    ns_dtype: NewtonSchulzDtype = "auto"
    use_8bit_optim: bool = False
    quantize_embeddings: bool = True
    quant_bits: Literal[8, 4, 2] = 8
    quant_codec: CodecName = "int8"
    quant_block_size: int = 128
    quant_scale_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quant_min_size: int = 4096
    stochastic_rounding: bool = False
    use_galore: bool = False
    galore_rank: int | float | dict[str, int | float] | None = None
    hardware: Literal["a", "b", "c"] | None = None
    galore_update_freq: int = 200
    galore_stagger: bool = False
    galore_adaptive: bool = False
    galore_warm_start: bool = False
    galore_momentum_share: float = 0.0
    galore_residual: float = 1.0
    galore_rest_bits: Literal[0, 2, 4, 8, 32] = 0
    galore_rest_momentum: float = 0.8
    galore_match_norm: bool = False
    galore_scale: float = 1.0
    projector_bits: Literal[32, 16, 8, 4] | None = None
    adam_betas: tuple[float, float] = (0.9, 0.95)
    lion_betas: tuple[float, float] = (0.9, 0.99)
    seed: int = 0

    def _checks(self) -> list[schema.Check]:
        at_least = {
            "warmup_steps": 0, "total_steps": 1, "grad_clip": 0, "ns_steps": 1,
            "quant_block_size": 1, "quant_min_size": 0,
            "galore_update_freq": 1, "galore_residual": 0, "galore_scale": 0,
            "weight_decay": 0, "lr": 0, "fallback_lr": 0, "seed": 0,
        }  # fmt: skip
        fractions = {
            "muon_momentum": [self.muon_momentum],
            "galore_rest_momentum": [self.galore_rest_momentum],
            "galore_momentum_share": [self.galore_momentum_share],
            "adam_betas": self.adam_betas,
            "lion_betas": self.lion_betas,
        }
        return [
            *schema.lower_bounds(self, at_least),
            *(
                (
                    all(0 <= b < 1 for b in betas),
                    f"`{name}` must lie in [0, 1), got {getattr(self, name)}.",
                )
                for name, betas in fractions.items()
            ),
            *_method_checks(self.ns_method, self.ns_steps),
            *_rank_checks(self.galore_rank),
            (
                self.galore_residual > 0 or not self.galore_rest_bits,
                "`galore_rest_bits` stores a momentum of what `galore_residual = 0` "
                "leaves out. Set one of them otherwise.",
            ),
            (
                not (self.galore_stagger and self.galore_adaptive),
                "`galore_stagger` and `galore_adaptive` both decide when a matrix "
                "changes its basis. Set one of them.",
            ),
            (
                not self.stochastic_rounding or self.quant_codec == "int8",
                '`stochastic_rounding` needs `quant_codec` to be "int8", got '
                f'"{self.quant_codec}".',
            ),
            (
                not self.stochastic_rounding or self.quant_bits != 2,
                "`stochastic_rounding` needs `quant_bits` to be 8 or 4, got 2.",
            ),
            (self.seed < 2**32, f"`seed` must be below 2**32, got {self.seed}."),
            *_schedule_checks(self),
        ]

    @property
    def decay_start(self) -> int:
        """Step at which the learning rate begins to fall."""
        if self.schedule != "wsd":
            return self.warmup_steps
        return round(self.decay_start_frac * self.total_steps)

    @property
    def rank(self) -> Rank:
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


def _schedule_checks(config: OptimizerConfig) -> list[schema.Check]:
    last, end = config.total_steps, "the run does, at step {} = total_steps"
    if config.schedule == "wsd":
        last = config.decay_start
        end = "the decay begins, at step {} = decay_start_frac x total_steps"
    fractions = {
        name: getattr(config, name) for name in ("decay_start_frac", "min_lr_frac")
    }
    return [
        *(
            (0 <= value <= 1, f"`{name}` must lie in [0, 1], got {value}.")
            for name, value in fractions.items()
        ),
        (
            config.warmup_steps <= last,
            f"`warmup_steps` must end before {end.format(last)}, got "
            f"{config.warmup_steps}.",
        ),
    ]


def _rank_checks(rank: Rank | None) -> list[schema.Check]:
    if isinstance(rank, int):
        return [(rank >= 1, f"`galore_rank` must be at least 1, got {rank}.")]
    try:
        check_rank(1 if rank is None else rank)
    except (TypeError, ValueError) as error:
        return [(False, str(error).replace("`rank`", "`galore_rank`"))]
    return []


def _method_checks(method: str, steps: int) -> list[schema.Check]:
    known = POLYNOMIALS.get(method)
    if known is None:
        return [
            (False, f"`ns_method` must be one of {[*POLYNOMIALS]}, got {method!r}.")
        ]
    most = len(known.coefficients)
    allowed = steps <= most or known.repeats
    message = f"`ns_steps` must be at most {most} for {method!r}, got {steps}."
    return [(allowed, message)]
