"""Settings of the optimizer."""

import dataclasses
import functools
from typing import Literal

from nanochat_jax.config import optimizer_checks, schema
from nanochat_jax.config.base import Settings
from nanochat_jax.config.depth import FALLBACK_LR
from nanochat_jax.config.group import Group, Rate
from nanochat_jax.config.schema import setting
from nanochat_jax.polynomials import FLOAT32_METHODS

HARDWARE_RANKS = {"a": 512, "b": 256, "c": 384}
"""GaLore rank by the parent project's hardware presets."""

_DEFAULT_RANK = 256

# The basis is quantised even where moments are not.
_QUANTISED = ("use_8bit_optim", "use_galore")

_muon = functools.partial(setting, group="Optimizer")
_few_bits = functools.partial(
    setting,
    group="Optimizer state in few bits",
    affects="storage",
    needs=("use_8bit_optim",),
)
_low_rank = functools.partial(
    setting, group="Optimizer state of low rank: GaLore", needs=("use_galore",)
)
_fallback = functools.partial(
    setting, group="Optimizer of embeddings, head and vectors"
)
_size = functools.partial(setting, group="Size of updates and weights")
_before = functools.partial(setting, group="Preconditioning and row norms")
_average = functools.partial(
    setting, group="Average of weights", needs=("average_horizon",), adamw=True
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Settings):
    """Settings of the optimizer; the names are the keys of a TOML file.

    Attributes:
      lr: Peak learning rate of the matrices; it may be traced. An Optax schedule is
        taken as it is, without the warm-up and the decay below.
      fallback: Optimizer of embeddings, head and vectors.
      fallback_lr: Peak learning rate of that optimizer, as `lr`; 0.003 for AdamW and
        0.0003 for Lion if not given.
      weight_decay: Decoupled weight decay of everything but vectors.
      fallback_weight_decay: That of embeddings and head, if another.
      weight_decay_schedule: Weight decay over the steps, a factor beside the learning
        rate: "constant", or down to zero at the end along a line, "linear", or half a
        cosine, "cosine".
      cautious_decay: Whether only those weights decay that the update makes smaller
        too (arXiv:2510.12402).
      warmup_steps: Steps of linear warm-up.
      total_steps: Steps of training, at whose end the learning rate has fallen. If not
        given, "wsd" never falls; the other schedules need it.
      schedule: Learning rate after warm-up: "wsd" (warm-up, stable, decay; Hu et al.
        2024, "MiniCPM") is constant and then falls linearly, "cosine" falls along half
        a cosine (Loshchilov and Hutter 2017, "SGDR"), and "linear" along a line.
      decay_start_frac: Fraction of the steps after which "wsd" begins to fall.
      min_lr_frac: Final learning rate as a fraction of its peak.
      grad_clip: Largest global norm of the gradient; 0 does not clip.
      muon_momentum: Decay of the momentum of matrices.
      muon_momentum_warmup_steps: Steps in which that decay rises along a line.
      muon_momentum_start: Decay of the momentum before these steps.
      muon_scale: Shape rule of the updates of matrices, as in `scale_by_shape`.
      ns_method: Newton-Schulz polynomials, by their name in `POLYNOMIALS`, or
        "zolotarev".
      ns_steps: Newton-Schulz steps, or poles of "zolotarev".
      ns_dtype: Type of the iteration; "auto" is bfloat16 where it is native.
      use_8bit_optim: Whether moments are quantised: the momentum of matrices in
        `quant_bits`, and the moments of AdamW or Lion in 8 bits.
      quantize_embeddings: Whether moments of embeddings and head are quantised too.
      quant_bits: Bits of the momentum of matrices; 4 are `Normal4`, or `Int4` if
        rounding is stochastic.
      quant_block_size: Entries that share a scale; half as many with `Normal4`.
      quant_min_size: Arrays with fewer entries are not quantised.
      stochastic_rounding: Whether first moments are rounded stochastically.
      use_galore: Whether matrices keep their momentum in a low-rank space.
      galore_rank: Rank of that space: a number, or a fraction of the shorter side. By
        `hardware`, else 256, if not given.
      hardware: Preset that gives the rank: 512 for "a", 256 for "b", 384 for "c".
      galore_update_freq: Steps between two changes of basis.
      galore_residual: Weight of the complement, the part of the gradient outside the
        space; 0 is the published method.
      galore_rest_bits: Bits of a momentum of the complement: 2 and 4 are `Normal2` and
        `Normal4`, 32 is not quantised; 0 for no such momentum.
      galore_rest_momentum: Decay of that momentum; few bits need a short one.
      projector_bits: Bits of the stored basis; 4 with `use_8bit_optim`, else 8, if not
        given.
      weight_rounding: How updates land on bfloat16 parameters: "stochastic" rounds up
        or down by chance, without bias; "split" keeps `master_bits` further bits of
        each; "nearest" loses updates below 2^-9 of a parameter, most of them.
      master_bits: Further bits of "split": 16 make float32.
      adam_betas: Decays of AdamW.
      lion_betas: Decays of Lion.
      vector_adam_b2: Decay of AdamW's second moment for vectors, if another.
      update_floor: Smallest norm of an update of a matrix, before the learning rate,
        as a part of the norm of its weights; 0 for none.
      row_floor: The same for the weights of each output neuron.
      fixed_norm: Whether matrices keep their initial norm (arXiv:2606.16899).
      normalize_rows: Division of the entries of each output neuron by their norm:
        "normuon" by a running one after orthogonalisation (arXiv:2510.05491),
        "muon_plus" by the present one (arXiv:2602.21545), "muon_eq" by the present one
        before it (arXiv:2603.28254).
      normuon_beta: Decay of the running one.
      precondition: Sides whose eigenbases updates are scaled in before they are
        orthogonalised, as in SOAP: "short" or "both".
      precondition_every: Steps between two computations of these bases.
      precondition_beta: Decay of the averages that they are the bases of, and of the
        second moment in them.
      precondition_bits: Bits of these averages and bases; 8 with `use_8bit_optim`, else
        32, if not given. The second moment has 8 with that and 32 without.
      average_horizon: Steps that an average of the weights reaches back, 0 for none;
        evaluations, samples, `generate` and `export` then read it.
      average_start_frac: Fraction of the steps after which it begins.
      freeze: Parameters that are left as they are, without gradient, state and weight
        decay: globs on their paths, such as "embed" or "*/attention". One that
        matches a module freezes all of it.
      groups: Parameters with settings of their own, `[[group]]` in a file.
      seed: Seed of sketches and stochastic rounding; in a run also of the parameters
        and of the order of the data.
    """

    lr: Rate = _muon(0.02, least=0, adamw=True)  # noqa: RUF009
    fallback: Literal["adamw", "lion"] = _muon("adamw")
    fallback_lr: Rate | None = _muon(None, least=0)  # noqa: RUF009
    weight_decay: float = _muon(0.0, least=0, adamw=True)
    fallback_weight_decay: float | None = _muon(None, least=0)
    weight_decay_schedule: Literal["constant", "linear", "cosine"] = _muon("constant")
    cautious_decay: bool = _muon(False)
    warmup_steps: int = _muon(0, least=0, adamw=True)
    total_steps: int | None = _muon(None, least=1)
    schedule: Literal["wsd", "cosine", "linear"] = _muon("wsd", adamw=True)
    decay_start_frac: float = _muon(0.8, adamw=True)
    min_lr_frac: float = _muon(0.0, adamw=True)
    grad_clip: float = _muon(1.0, least=0, adamw=True)
    muon_momentum: float = _muon(0.95)
    muon_momentum_warmup_steps: int = _muon(0, least=0)
    muon_momentum_start: float = _muon(0.85, needs=("muon_momentum_warmup_steps",))
    muon_scale: Literal["width", "rms", "none"] = _muon("width")
    ns_method: str = _muon("quintic")
    ns_steps: int = _muon(5, least=1)
    ns_dtype: Literal["auto", "float32", "bfloat16"] = _muon("auto")
    use_8bit_optim: bool = _few_bits(False, needs=())
    quantize_embeddings: bool = _few_bits(True)
    quant_bits: Literal[8, 4] = _few_bits(8)
    quant_block_size: int = _few_bits(128, least=1, needs=_QUANTISED)
    quant_min_size: int = _few_bits(4096, least=0, needs=_QUANTISED)
    stochastic_rounding: bool = _few_bits(False)
    use_galore: bool = _low_rank(False, needs=())
    galore_rank: int | float | None = _low_rank(None, adamw=True)
    hardware: Literal["a", "b", "c"] | None = _low_rank(None)
    galore_update_freq: int = _low_rank(200, least=1, adamw=True)
    galore_residual: float = _low_rank(1.0, least=0)
    galore_rest_bits: Literal[0, 2, 4, 32] = _low_rank(0)
    galore_rest_momentum: float = _low_rank(0.8, needs=("galore_rest_bits",))
    projector_bits: Literal[32, 8, 4] | None = _low_rank(None, affects="storage")
    weight_rounding: Literal["stochastic", "split", "nearest"] = _muon(
        "stochastic", adamw=True
    )
    master_bits: Literal[8, 16] = _muon(8, adamw=True)
    adam_betas: tuple[float, float] = _fallback((0.9, 0.95), adamw=True)
    lion_betas: tuple[float, float] = _fallback((0.9, 0.99))
    vector_adam_b2: float | None = _fallback(None)
    update_floor: float = _size(0.0, least=0)
    row_floor: float = _size(0.0, least=0)
    fixed_norm: bool = _size(False)
    normalize_rows: Literal["normuon", "muon_plus", "muon_eq"] | None = _before(None)
    normuon_beta: float = _before(0.95, needs=("normalize_rows",))
    precondition: Literal["short", "both"] | None = _before(None)
    precondition_every: int = _before(10, least=1, needs=("precondition",))
    precondition_beta: float = _before(0.9, needs=("precondition",))
    precondition_bits: Literal[32, 16, 8] | None = _before(
        None, needs=("precondition",), affects="storage"
    )
    average_horizon: int = _average(0, least=0, needs=())
    average_start_frac: float = _average(0.8)
    freeze: tuple[str, ...] = _muon(())
    groups: tuple[Group, ...] = _muon((), flag=False)
    seed: int = setting(0, group="Random numbers", least=0)

    def _checks(self) -> list[schema.Check]:
        fractions = {
            "muon_momentum": [self.muon_momentum],
            "galore_rest_momentum": [self.galore_rest_momentum],
            "adam_betas": self.adam_betas,
            "lion_betas": self.lion_betas,
            "muon_momentum_start": [self.muon_momentum_start],
            "vector_adam_b2": [self.vector_adam_b2 or 0.0],
            "normuon_beta": [self.normuon_beta],
            "precondition_beta": [self.precondition_beta],
        }
        return [
            *(
                (
                    all(0 <= b < 1 for b in betas),
                    f"`{name}` must lie in [0, 1), got {getattr(self, name)}.",
                )
                for name, betas in fractions.items()
            ),
            *optimizer_checks.all_checks(self),
            (
                self.galore_residual > 0 or not self.galore_rest_bits,
                "`galore_rest_bits` stores a momentum of what `galore_residual = 0` "
                "leaves out. Set one of them otherwise.",
            ),
            (self.seed < 2**32, f"`seed` must be below 2**32, got {self.seed}."),
            (
                self.normalize_rows != "muon_eq"
                or not self.use_galore
                or self.galore_residual > 0,
                '`normalize_rows = "muon_eq"` stands between momentum and '
                "orthogonalisation, which are both in the low-rank space with "
                "`galore_residual = 0`. Set one of them otherwise.",
            ),
        ]

    @property
    def iteration_dtype(self) -> str:
        """Type of orthogonalisation: `ns_dtype`, or float32 if a method needs it."""
        return "float32" if self.ns_method in FLOAT32_METHODS else self.ns_dtype

    @property
    def decay_start(self) -> int | None:
        """Step at which the learning rate begins to fall; `None` if it never does."""
        if self.total_steps is None:
            return None
        if self.schedule != "wsd":
            return self.warmup_steps
        return round(self.decay_start_frac * self.total_steps)

    @property
    def rank(self) -> int | float:
        """GaLore rank: `galore_rank`, else the preset of `hardware`, else 256."""
        preset = HARDWARE_RANKS[self.hardware] if self.hardware else _DEFAULT_RANK
        return self.galore_rank or preset

    @property
    def fallback_peak_lr(self) -> Rate:
        """Peak learning rate of embeddings, head and vectors."""
        given = self.fallback_lr
        return FALLBACK_LR[self.fallback] if given is None else given

    @property
    def fallback_peak_decay(self) -> float:
        """Weight decay of embeddings and head."""
        given = self.fallback_weight_decay
        return self.weight_decay if given is None else given

    @property
    def stored_projector_bits(self) -> int:
        """Bits of the stored basis: `projector_bits`, else by `use_8bit_optim`."""
        return self.projector_bits or (4 if self.use_8bit_optim else 8)

    @property
    def stored_precondition_bits(self) -> int:
        """Bits of Gram averages and bases of `precondition`."""
        return self.precondition_bits or (8 if self.use_8bit_optim else 32)

    @property
    def average(self) -> tuple[int, int] | None:
        """Start and horizon of the average of weights; `None` without one."""
        if not self.average_horizon or self.total_steps is None:
            return None
        return round(self.average_start_frac * self.total_steps), self.average_horizon

    @property
    def variant(self) -> str:
        """Short name of the Muon variant, such as `"galore_8bit"`."""
        base = "muon"
        if self.use_galore:
            base = "galore" if self.galore_residual else "galore_plain"
        return f"{base}_{self.quant_bits}bit" if self.use_8bit_optim else base
