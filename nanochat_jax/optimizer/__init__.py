"""Muon for matrices, AdamW or Lion for the rest, put together from transforms.

build      `build_optimizer`, from a configuration
chains     transforms in a row, for one part of the parameters
muon       `muon`, one line without a configuration
rule       rates, decays and betas, and the schedule
storage    codecs and ranks of a configuration
groups/    parameters with settings of their own
roles/     the part of every parameter, and the axes of its matrices
notes      what the optimizer of a label is asked to do, for reports
describe   a table of view, optimizer and state of every parameter
advice     its warnings
rates      learning rates in force, from a state
memory     bytes of state and of the compiled update
sharding   state and updates on a mesh of devices
flops      operations of an update
baselines  AdamW and GaLore as Optax has them
backward/  training steps that update each layer in the backward pass
"""

from nanochat_jax.optimizer import roles as roles
from nanochat_jax.optimizer.backward import (
    BackwardStep as BackwardStep,
    StepReport as StepReport,
    mean_over as mean_over,
    sum_dtype as sum_dtype,
    update_in_backward as update_in_backward,
)
from nanochat_jax.optimizer.baselines import build_adamw as build_adamw
from nanochat_jax.optimizer.build import build_optimizer as build_optimizer
from nanochat_jax.optimizer.chains import matrix_optimizer as matrix_optimizer
from nanochat_jax.optimizer.describe import (
    Description as Description,
    describe as describe,
)
from nanochat_jax.optimizer.flops import (
    newton_schulz_flops as newton_schulz_flops,
    update_flops as update_flops,
)
from nanochat_jax.optimizer.memory import (
    MemoryReport as MemoryReport,
    compiled_bytes as compiled_bytes,
    memory_report as memory_report,
    planned_bytes as planned_bytes,
)
from nanochat_jax.optimizer.muon import MUON_STATIC as MUON_STATIC, muon as muon
from nanochat_jax.optimizer.rates import learning_rates as learning_rates
from nanochat_jax.optimizer.roles import label_params as label_params
from nanochat_jax.optimizer.rule import (
    Rule as Rule,
    in_group as in_group,
    schedule as schedule,
)
from nanochat_jax.optimizer.sharding import (
    bytes_per_device as bytes_per_device,
    distribute as distribute,
    init_sharded as init_sharded,
    state_sharding as state_sharding,
)
from nanochat_jax.optimizer.storage import (
    fallback_codecs as fallback_codecs,
    rank_of as rank_of,
    state_codecs as state_codecs,
)
