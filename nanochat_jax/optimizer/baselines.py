"""Baselines for Muon, built from Optax's own parts.

They read the settings of `OptimizerConfig` that are declared with `adamw=True`; `lr` is
the peak learning rate of all parameters.
"""

import optax
import optax.contrib

from nanochat_jax.config import OptimizerConfig
from nanochat_jax.optimizer.chains import has_short, landing
from nanochat_jax.optimizer.roles import label_params
from nanochat_jax.optimizer.rule import schedule
from nanochat_jax.transforms import in_float32


def build_adamw(
    config: OptimizerConfig, params: optax.Params
) -> optax.GradientTransformationExtraArgs:
    """Builds AdamW for every parameter; with `use_galore`, GaLore's for the matrices.

    The latter is `optax.contrib.galore` over Adam (Zhao et al. 2024, arXiv:2403.03507):
    both moments live in the space of the gradient's leading singular vectors, found by
    an SVD every `galore_update_freq` steps.

    Args:
      config: Rates, decays, and GaLore's rank and interval.
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      An Optax transformation, from gradients to updates.

    Raises:
      ValueError: If GaLore's rank is a fraction, parameters are to be frozen, or there
        are groups.
    """
    if config.freeze:
        raise ValueError(
            "the AdamW baselines train all parameters, but `freeze` is "
            f"{[*config.freeze]}. Leave one of the two out."
        )
    if config.groups:
        matches = [group.match for group in config.groups]
        raise ValueError(
            "the AdamW baselines have the same settings for all parameters, but "
            f"there are the groups {matches}. Leave one of the two out."
        )
    rate, betas = schedule(config, config.lr), config.adam_betas
    plain = optax.adamw(rate, *betas, weight_decay=config.weight_decay)
    matrix = plain
    if config.use_galore:
        if not isinstance(config.rank, int):
            raise ValueError(
                "`optax.contrib.galore` needs one whole `galore_rank` for all "
                f"matrices, got {config.rank}."
            )
        matrix = optax.contrib.galore(
            rate,
            rank=config.rank,
            update_proj_gap=config.galore_update_freq,
            base_optimizer=optax.scale_by_adam(*betas),
            weight_decay=config.weight_decay,
        )
    by_label = optax.partition(
        {
            "matrix": matrix,
            "embedding": plain,
            "head": plain,
            "vector": optax.adamw(rate, *betas, weight_decay=0.0),
        },
        label_params(params),
    )
    tx = by_label
    if config.grad_clip:
        clip = optax.clip_by_global_norm(config.grad_clip)
        tx = optax.named_chain(("clip", clip), ("by_label", by_label))
    short = has_short(params)
    if not short and config.average is None:
        return tx
    return landing(in_float32(tx), config, short, config.average)
