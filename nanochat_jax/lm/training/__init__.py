"""TODO."""

from nanochat_jax.lm.training import resume as resume
from nanochat_jax.lm.training.accumulate import accumulator_bytes as accumulator_bytes
from nanochat_jax.lm.training.loop import fit as fit
from nanochat_jax.lm.training.optimizer_share import (
    OptimizerShare as OptimizerShare,
    timed as timed,
)
from nanochat_jax.lm.training.profiler import (
    StepProfiler as StepProfiler,
    parse_steps as parse_steps,
)
from nanochat_jax.lm.training.run import (
    Run as Run,
    prepare as prepare,
    train_batches as train_batches,
)
from nanochat_jax.lm.training.step import (
    TrainState as TrainState,
    compile_low_rank_step as compile_low_rank_step,
    compile_train_step as compile_train_step,
    init_state as init_state,
)
from nanochat_jax.lm.training.text_samples import (
    Sampler as Sampler,
    make_sampler as make_sampler,
)
