"""TODO."""

from nanochat_jax.lm.model import (
    activation_sharding as activation_sharding,
    gpt as gpt,
    param_sharding as param_sharding,
)
from nanochat_jax.lm.model.gpt import (
    Params as Params,
    count_flops_per_token as count_flops_per_token,
)
from nanochat_jax.lm.model.layer_stacking import unstack_layers as unstack_layers
from nanochat_jax.lm.model.roles import (
    build_optimizer as build_optimizer,
    kernel_axes as kernel_axes,
    label_params as label_params,
)
from nanochat_jax.lm.model.sampling import generate as generate
