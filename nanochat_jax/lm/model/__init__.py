"""The GPT: its layers, loss, sampling, and shardings on a mesh.

activation_sharding  shardings of batches and activations
attention            rotary positions, and causal attention in parts
block                attention, feed-forward layer, and the block made of them
functions            loss, its operations, functions around stacked blocks, QK-clip
gpt                  the model, and pure functions of its parameters
layer_stacking       parameters of stacked blocks, one by one
loss                 cross-entropy in chunks of positions
param_sharding       the mesh of devices, and the shardings of parameters
recomputed           products whose factors the backward pass makes again
roles                labels and matrix axes of the parameters, for the optimizer
sampling             generation of tokens with a cache
table                look-up and read-out, in pieces of the vocabulary
ternary              linear layers with weights of -1, 0 and 1
"""

from nanochat_jax.lm.model import (
    activation_sharding as activation_sharding,
    gpt as gpt,
    param_sharding as param_sharding,
)
from nanochat_jax.lm.model.functions import (
    as_functions as as_functions,
    clip_attention as clip_attention,
    count_flops_per_token as count_flops_per_token,
    count_predictions as count_predictions,
    largest_scores as largest_scores,
    next_token_loss as next_token_loss,
)
from nanochat_jax.lm.model.gpt import (
    Params as Params,
)
from nanochat_jax.lm.model.layer_stacking import unstack_layers as unstack_layers
from nanochat_jax.lm.model.roles import (
    build_optimizer as build_optimizer,
    kernel_axes as kernel_axes,
    label_params as label_params,
)
from nanochat_jax.lm.model.sampling import generate as generate
