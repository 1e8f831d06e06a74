"""Muon as one function, a drop-in for `optax.contrib.muon` or `optax.adamw`."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import jax
import optax
from jax.typing import ArrayLike

from nanochat_jax.config import Group, OptimizerConfig
from nanochat_jax.optimizer.build import assemble
from nanochat_jax.optimizer.roles import settle
from nanochat_jax.optimizer.rule import Rule, scaled
from nanochat_jax.polynomials import default_steps
from nanochat_jax.transforms import Rank, ShapeScale, check_rank

ADAM_SHARE = 0.15
"""Learning rate of AdamW over that of Muon, by default: 0.003 for 0.02."""


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    bits: Literal[32, 8, 4] = 32,
    rank: Rank | None = None,
    complement: float = 1.0,
    complement_bits: Literal[0, 2, 4, 32] = 0,
    complement_beta: float = 0.8,
    refresh_every: int = 200,
    basis_bits: Literal[32, 8, 4] | None = None,
    beta: optax.ScalarOrSchedule = 0.95,
    nesterov: bool = True,
    bias_correction: bool = False,
    ns_method: str = "quintic",
    ns_steps: int | None = None,
    ns_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    scale: ShapeScale = "width",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    grad_clip: float = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: ArrayLike = 0.9,
    adam_b2: ArrayLike = 0.95,
    adam_weight_decay: optax.ScalarOrSchedule | None = None,
    adam_nesterov: bool = False,
    adam_vector_b2: ArrayLike | None = None,
    cautious_decay: bool = False,
    update_floor: float = 0.0,
    row_floor: float = 0.0,
    fixed_norm: bool = False,
    normalize_rows: Literal["normuon", "muon_plus", "muon_eq"] | None = None,
    normuon_beta: float = 0.95,
    precondition: Literal["short", "both"] | None = None,
    precondition_every: int = 10,
    precondition_beta: float = 0.9,
    precondition_bits: Literal[32, 16, 8] | None = None,
    average_horizon: int = 0,
    average_start: int = 0,
    block_size: int = 128,
    min_size: int = 4096,
    stochastic_rounding: bool = False,
    quantize_embeddings: bool = True,
    seed: int = 0,
    matrix_axes: Any = None,
    labels: Any = None,
    groups: Sequence[Group] = (),
) -> optax.GradientTransformationExtraArgs:
    """Makes Muon for the matrices of a model, and AdamW for its other parameters.

    It takes the place of `optax.contrib.muon(0.02)` or `optax.adamw(3e-3)`, and needs
    no parameters to be made: at `init`, module classes, names and shapes settle which
    parameters are matrices, and along which axes (`describe` shows how). Parameters
    that they do not settle are refused.

    With `bits=8` all moments are stored in 8 bits, a quarter of the memory; with a
    `rank` the momentum of matrices lives in a low-rank space as well.

    Under `optax.inject_hyperparams`, pass `static_args=MUON_STATIC`: rates, decays and
    betas are then in the state, and may be changed while training.

    Example:
      >>> params = {"up": {"kernel": jnp.ones((64, 256)), "bias": jnp.zeros(256)}}
      >>> tx = muon(0.02, bits=8, weight_decay=0.01)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> adaptable = optax.inject_hyperparams(muon, static_args=MUON_STATIC)
      >>> state = adaptable(learning_rate=0.02, bits=8).init(params)
      >>> state.hyperparams["learning_rate"]
      Array(0.02, dtype=float32)

    Args:
      learning_rate: Learning rate of the matrices, or an Optax schedule.
      bits: Bits of the stored moments: 32, not quantised; 8; or 4 for the momentum of
        matrices with 8 for the moments of AdamW.
      rank: Rank of GaLore's space, a number or a fraction of the shorter side; `None`
        for full rank.
      complement: Weight of the part of the gradient outside that space; 0 is GaLore as
        published.
      complement_bits: Bits of a momentum of the complement; 0 for none.
      complement_beta: Decay of that momentum.
      refresh_every: Steps between two changes of basis.
      basis_bits: Bits of the stored basis; 4 with quantised moments, else 8, if not
        given.
      beta: Decay of the momentum of matrices, or a schedule.
      nesterov: Whether that momentum looks one step ahead.
      bias_correction: Whether its early bias is corrected, as `optax.contrib.muon`
        does.
      ns_method: Newton-Schulz polynomials, by their name in `POLYNOMIALS`, or
        `"zolotarev"`: fractions in float32, in fewer operations and nearer to the polar
        factor, for processors.
      ns_steps: Newton-Schulz steps; as many as the method has if not given, such as 5
        of the quintic. Poles of `"zolotarev"`: 2 if not given, 3 or 4.
      ns_dtype: Type of the iteration; `"auto"` is bfloat16 where it is native.
      scale: Shape rule of the updates of matrices, as for `scale_by_shape`.
      weight_decay: Decoupled weight decay of matrices, or a schedule.
      grad_clip: Largest global norm of the gradient; 0 does not clip.
      adam_learning_rate: Learning rate of AdamW, or a schedule; 0.15 times
        `learning_rate` if not given.
      adam_b1: Decay of AdamW's first moment.
      adam_b2: Decay of AdamW's second moment.
      adam_weight_decay: Decoupled weight decay of embeddings and head; that of the
        matrices if not given. Vectors have none.
      adam_nesterov: Whether AdamW looks one step ahead.
      adam_vector_b2: Decay of AdamW's second moment for vectors, if another.
      cautious_decay: Whether only those weights decay that the update makes smaller.
      update_floor: Ratio of `floor_updates` for matrices; 0 for none.
      row_floor: The same for the weights of each output neuron.
      fixed_norm: Whether matrices keep their initial norm, as for `fix_norms`.
      normalize_rows: Norms of output neurons that updates are divided by: running ones
        after orthogonalisation, or present ones after it, or before it.
      normuon_beta: Decay of the running ones.
      precondition: Sides whose eigenbases updates are scaled in before they are
        orthogonalised, as for `precondition`.
      precondition_every: Steps between two computations of these bases.
      precondition_beta: Decay of the averages behind them, and of the second moment.
      precondition_bits: Bits of these averages and bases; 8 with quantised moments,
        else 32, if not given.
      average_horizon: Steps that an average of the weights reaches back, for
        `averaged_weights`; 0 for none.
      average_start: Steps before the first weights that count in it.
      block_size: Entries of a stored moment that share a scale.
      min_size: Arrays with fewer entries are not quantised.
      stochastic_rounding: Whether first moments are rounded stochastically.
      quantize_embeddings: Whether moments of embeddings and head are quantised too.
      seed: Seed of random sketches and of stochastic rounding.
      matrix_axes: Axes of matrices, as for `build_optimizer`.
      labels: Labels, as for `build_optimizer`.
      groups: Parameters with settings of their own. A number in `lr` is one for all
        steps, also where `learning_rate` is a schedule.

    Returns:
      An Optax transformation, from gradients to updates.

    Raises:
      TypeError: If an argument that fixes shapes or programs is traced.
      ValueError: If an argument is out of range; at `init`, if nothing tells which axes
        of a leaf are a matrix, or a group matches no parameter.
    """
    arguments = dict(locals())
    _require_static(arguments)
    _require_needed(arguments)
    if bits not in (32, 8, 4):
        raise ValueError(f"`bits` must be 32, 8 or 4, got {bits!r}.")
    if rank is not None:
        check_rank(rank)
    if ns_steps is None:
        ns_steps = default_steps(ns_method)
    config = _configuration(
        arguments,
        use_8bit_optim=bits < 32,
        quant_bits=8 if bits == 32 else bits,
        use_galore=rank is not None,
        galore_rank=rank,
        galore_residual=complement,
        galore_rest_bits=complement_bits,
        galore_rest_momentum=complement_beta,
        galore_update_freq=refresh_every,
        projector_bits=basis_bits,
        ns_steps=ns_steps,
        muon_scale=scale,
        quant_block_size=block_size,
        quant_min_size=min_size,
        **{name: arguments[name] for name in _SHARED},
    )
    if adam_learning_rate is None:
        adam_learning_rate = scaled(learning_rate, ADAM_SHARE)
    if adam_weight_decay is None:
        adam_weight_decay = weight_decay
    rule = Rule(
        rate=learning_rate,
        decay=weight_decay,
        beta=beta,
        nesterov=nesterov,
        bias_correction=bias_correction,
        fallback_rate=adam_learning_rate,
        fallback_decay=adam_weight_decay,
        fallback_betas=(adam_b1, adam_b2),
        fallback_nesterov=adam_nesterov,
        vector_b2=adam_vector_b2,
        average=_average(average_start, average_horizon),
    )
    roles = lambda tree: settle(
        tree, labels=labels, matrix_axes=matrix_axes, groups=config.groups
    )
    return assemble(config, rule, roles)


# Numbers that may be traced or schedules, or whose defaults are found here.
_OWN = {"ns_steps", "weight_decay", "average_horizon"}

_SHARED = {field.name for field in dataclasses.fields(OptimizerConfig)}.intersection(
    inspect.signature(muon).parameters
) - _OWN

# Arguments by the names that they have in an `OptimizerConfig`.
_NAMES = {
    "lr": "learning_rate", "muon_momentum": "beta", "muon_scale": "scale",
    "galore_residual": "complement", "galore_rest_bits": "complement_bits",
    "galore_rest_momentum": "complement_beta", "galore_update_freq": "refresh_every",
    "galore_rank": "rank", "projector_bits": "basis_bits",
    "adam_betas": "adam_b1` and `adam_b2", "vector_adam_b2": "adam_vector_b2",
    "quant_block_size": "block_size", "quant_min_size": "min_size",
}  # fmt: skip


def _configuration(arguments: dict[str, Any], **settings: Any) -> OptimizerConfig:
    """Returns settings, checked with the numbers that are known, by muon's names."""
    numbers = {
        "lr": arguments["learning_rate"],
        "weight_decay": arguments["weight_decay"],
        "muon_momentum": arguments["beta"],
        "adam_betas": (arguments["adam_b1"], arguments["adam_b2"]),
        "vector_adam_b2": arguments["adam_vector_b2"],
    }
    parts = lambda x: x if isinstance(x, tuple) else (x,)
    known = {
        name: x
        for name, x in numbers.items()
        if all(isinstance(each, int | float | str) for each in parts(x))
    }
    try:
        return OptimizerConfig(**settings, **known)
    except ValueError as error:
        lines = map(_in_own_names, str(error).splitlines())
        raise ValueError("\n".join(lines)) from None


def _in_own_names(line: str) -> str:
    """Returns a line of a message with arguments for keys."""
    if line.startswith("`groups`") or " in the group " in line:
        return line  # Groups have keys of their own, by the names of configurations.
    for theirs, ours in _NAMES.items():
        line = line.replace(f"`{theirs}", f"`{ours}")
    return line


def _average(start: int, horizon: int) -> tuple[int, int] | None:
    """Returns start and horizon of an average of weights, `None` for none."""
    if min(start, horizon) < 0:
        raise ValueError(
            "`average_start` and `average_horizon` must be at least 0, got "
            f"{start} and {horizon}."
        )
    return (start, horizon) if horizon else None


# Arguments, and those without which they have no effect.
_NEEDING = {
    "rank": (
        "complement", "complement_bits", "complement_beta", "refresh_every",
        "basis_bits",
    ),
    "precondition": ("precondition_every", "precondition_beta", "precondition_bits"),
    "normalize_rows": ("normuon_beta",),
    "average_horizon": ("average_start",),
}  # fmt: skip


def _require_needed(arguments: dict[str, Any]) -> None:
    """Refuses arguments about what is not asked for."""
    defaults = inspect.signature(muon).parameters
    errors = []
    for switch, names in _NEEDING.items():
        given = [f"`{x}`" for x in names if arguments[x] != defaults[x].default]
        if given and not arguments[switch]:
            errors.append(f"`{switch}` is required by {', '.join(given)}, got none.")
    if errors:
        raise ValueError("\n".join(errors))


_INJECTABLE = {
    "learning_rate", "weight_decay", "beta", "adam_learning_rate", "adam_b1", "adam_b2",
    "adam_vector_b2", "adam_weight_decay",
}  # fmt: skip

MUON_STATIC = tuple(
    name for name in inspect.signature(muon).parameters if name not in _INJECTABLE
)
"""Arguments of `muon` that cannot be traced, for `optax.inject_hyperparams`."""


def _require_static(arguments: dict[str, Any]) -> None:
    """Refuses traced values of arguments that fix shapes or programs."""
    traced = [name for name in MUON_STATIC if isinstance(arguments[name], jax.Array)]
    if traced:
        raise TypeError(
            f"`muon` needs Python values for {traced}, which fix shapes and programs, "
            "got JAX arrays. Under `optax.inject_hyperparams`, pass "
            "`static_args=nanochat_jax.MUON_STATIC`."
        )
