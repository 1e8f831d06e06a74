"""Training: the pure compiled step, and the loop of the host around it.

run              settings, data, model and optimizer of a run, before it trains
step             the training step: gradient, guard, update; its state
accumulate       mean loss and gradient over microbatches
guard            skips steps that are not finite or are spikes
device_batches   batches on the devices that work on them
loop             what the host does between two steps
reporter         metrics, evaluations, speed and samples, at their intervals
evaluation       validation loss
read_out         weights that are evaluated, averages if these are kept
text_samples     samples of text from a model in training
optimizer_share  the optimizer's part of the time of a step
profiler         a trace of some steps
resume           which settings may differ on resumption; states stored otherwise
"""

from nanochat_jax.lm.training import resume as resume
from nanochat_jax.lm.training.loop import fit as fit
from nanochat_jax.lm.training.optimizer_share import (
    OptimizerShare as OptimizerShare,
    timed as timed,
)
from nanochat_jax.lm.training.profiler import (
    StepProfiler as StepProfiler,
    parse_steps as parse_steps,
)
from nanochat_jax.lm.training.read_out import read_out as read_out
from nanochat_jax.lm.training.reporter import Reporter as Reporter
from nanochat_jax.lm.training.run import (
    Run as Run,
    make_run as make_run,
    train_batches as train_batches,
)
from nanochat_jax.lm.training.step import (
    TrainState as TrainState,
    compile_train_step as compile_train_step,
    init_state as init_state,
)
from nanochat_jax.lm.training.text_samples import (
    Sampler as Sampler,
    make_sampler as make_sampler,
)
