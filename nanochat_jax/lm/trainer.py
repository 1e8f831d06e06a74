"""Training: one pure compiled step, and the loop around it.

A batch goes from the file to a parameter update through four files: `data.Batches`
cuts it from the corpus, `model.next_token_loss` turns it into a loss, the transforms
of `optimizer.build_optimizer` turn the gradient into an update, and `make_train_step`
here adds it to the parameters. On the way `feed` moves it to the devices,
`mean_gradient` takes its microbatches one by one, and `guard` holds back a step whose
numbers are not finite.

Axes: A microbatches, B sequences, S tokens of a sequence.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from nanochat_jax.config import Config
from nanochat_jax.lm import guard, model, spread
from nanochat_jax.lm.accumulate import mean_gradient
from nanochat_jax.lm.checkpoint import Checkpoints
from nanochat_jax.lm.display import Display
from nanochat_jax.lm.feed import feed
from nanochat_jax.lm.profiler import StepProfiler
from nanochat_jax.lm.reporter import Reporter, Sample, due
from nanochat_jax.lm.setup import Run
from nanochat_jax.lm.sinks import Sink
from nanochat_jax.lm.timing import OptimizerShare
from nanochat_jax.sharding import state_sharding
from nanochat_jax.transforms import project_gradients

TrainStep = Callable[["TrainState", Array], tuple["TrainState", dict[str, Array]]]


class TrainState(NamedTuple):
    """All that changes in training; data and random keys follow from the step.

    Attributes:
      step: Steps done, those that were skipped among them.
      params: Parameters of the model, float32.
      opt_state: State of the optimizer.
      guard: What is remembered of these, and of the usual loss.
    """

    step: Int32[Array, ""]
    params: model.Params
    opt_state: optax.OptState
    guard: guard.Guard


def init_state(run: Run) -> TrainState:
    """Returns the state before the first step, each array made where it belongs."""
    where = state_places(run)
    init_params = lambda: model.init(run.config, run.config.seed)[1]
    params = jax.jit(init_params, out_shardings=where and where.params)()
    init_opt_state = jax.jit(run.tx.init, out_shardings=where and where.opt_state)
    init_guard = jax.jit(guard.init, out_shardings=where and where.guard)
    step = jnp.zeros([], jnp.int32, device=where and where.step)
    return TrainState(step, params, init_opt_state(params), init_guard())


def make_train_step(
    graphdef: nnx.GraphDef[model.GPT],
    tx: optax.GradientTransformationExtraArgs,
    *,
    spike_skip: float = 0.0,
    low_rank: bool = False,
) -> TrainStep:
    """Returns the pure function of one step, to be jitted with its state donated.

    It takes a state and a batch, int32 `[A, B, S + 1]`, and returns the next state and
    the metrics `loss`, in nats a token, `grad_norm`, before clipping, `skipped`, steps
    in all that were skipped, and `in_a_row`, of these the last ones without a break.

    Args:
      graphdef: Structure of the model.
      tx: The optimizer.
      spike_skip: As for `guard.judge`.
      low_rank: For steps that change none of GaLore's bases: gradients are added up as
        it projects them, and the norm is of these.
    """
    loss_fn = lambda params, batch: model.next_token_loss(graphdef, params, batch)

    def train_step(
        state: TrainState, batch: Int32[Array, "A B S+1"]
    ) -> tuple[TrainState, dict[str, Array]]:
        step, params, opt_state, watched = state
        extra: dict[str, Any] = {"projected": True} if low_rank else {}
        project = lambda grads: (
            project_gradients(tx, opt_state, grads, params) if low_rank else grads
        )
        loss, grads = mean_gradient(loss_fn, params, batch, project)
        norm = optax.tree.norm(grads)
        take, watched = guard.judge(watched, loss, norm, spike_skip)
        update = functools.partial(tx.update, value=loss, **extra)
        params, opt_state = guard.update_if(take, update, grads, opt_state, params)
        metrics = {"loss": loss, "grad_norm": norm}
        metrics |= {"skipped": watched.skipped, "in_a_row": watched.in_a_row}
        return TrainState(step + 1, params, opt_state, watched), metrics

    return train_step


def compile_train_step(run: Run, *, low_rank: bool = False) -> jax.stages.Compiled:
    """Compiles the step of a run for its shapes, its state donated.

    Args:
      run: The run.
      low_rank: As for `make_train_step`.
    """
    spike_skip = run.config.spike_skip
    step = make_train_step(
        run.graphdef, run.tx, spike_skip=spike_skip, low_rank=low_rank
    )
    where = state_places(run)
    out = where and (where, where.step)  # metrics are whole on every device
    jitted = jax.jit(step, donate_argnums=0, out_shardings=out)
    with spread.using(run.mesh):
        return jitted.lower(abstract_state(run), _abstract_batch(run)).compile()


def compile_low_rank_step(run: Run) -> jax.stages.Compiled | None:
    """Compiles the step between two changes of bases, if it accumulates otherwise."""
    if not run.config.accumulates_low_rank:
        return None
    return compile_train_step(run, low_rank=True)


def abstract_state(run: Run) -> TrainState:
    """Returns shapes and types of the state of a run, and where it is on a mesh."""
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(run.tx.init, run.params)
    state = TrainState(count, run.params, opt_state, jax.eval_shape(guard.init))
    at = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    where = state_places(run)
    return state if where is None else jax.tree.map(at, state, where)


def state_places(run: Run) -> Any:
    """Returns a `TrainState` of shardings, or `None` without a mesh."""
    if run.mesh is None:
        return None
    whole = NamedSharding(run.mesh, PartitionSpec())
    params: Any = jax.tree.map(lambda x: x.sharding, run.params)
    watched: Any = jax.tree.map(lambda _: whole, jax.eval_shape(guard.init))
    count: Any = whole
    return TrainState(count, params, state_sharding(run.tx, run.params), watched)


def fit(
    run: Run,
    state: TrainState,
    train_step: jax.stages.Compiled,
    *,
    low_rank_step: jax.stages.Compiled | None = None,
    display: Display,
    sinks: Sequence[Sink] = (),
    checkpoints: Checkpoints | None = None,
    sample: Sample | None = None,
    profiler: StepProfiler | None = None,
    share: OptimizerShare | None = None,
    stop: Callable[[int], bool] = lambda step: False,
) -> TrainState:
    """Trains from `state` to the last step of the run, or until it is to stop.

    Args:
      run: What to train.
      state: Where to begin; it is donated.
      train_step: The compiled step, from `compile_train_step`.
      low_rank_step: The step for when no basis changes, from `compile_low_rank_step`.
      display: Where progress is shown.
      sinks: Where metrics are written.
      checkpoints: Where states are saved, if anywhere.
      sample: Returns text for parameters and step, shown every `sample_interval` steps.
      profiler: What traces some of the steps.
      share: What times the optimizer, at the first steps whose metrics are logged.
      stop: Asked after each step, with the steps done, whether to save and stop there.

    Returns:
      The state after the last step.

    Raises:
      FloatingPointError: If `max_skipped_steps` in a row were skipped, or a validation
        loss is not finite. No checkpoint of that step is left.
    """
    config, first = run.config, int(state.step)
    reporter = Reporter(run, first, display, sinks, sample, share)
    if first == 0:
        reporter.start(state.params)
    skipped, previous = int(state.guard.skipped), None
    with contextlib.closing(feed(run, first, config.total_steps)) as batches:
        for step, batch in batches:
            if profiler:
                profiler.at(step)
            take_step = train_step
            if low_rank_step and not changes_bases(config, state, step, skipped):
                take_step = low_rank_step
            if share and share.wanted and due(step + 1, config.log_interval):
                take_step = functools.partial(share.take, take_step)
            state, values = take_step(state, batch)
            if previous:
                # One step stays in flight while the host looks at the one before.
                skipped = guard.check(previous, step, config.max_skipped_steps)
            previous, done = values, step + 1
            reporter.step(done, state.params, values)
            stopping = stop(done) or done == config.total_steps
            if checkpoints and (stopping or due(done, config.checkpoint_interval)):
                checkpoints.save(done, state, run.meta)
            if stopping:
                break
    if previous:
        guard.check(previous, int(state.step), config.max_skipped_steps)
    return state


def _abstract_batch(run: Run) -> jax.ShapeDtypeStruct:
    """Returns shape and type of a batch, and where it is on a mesh."""
    config = run.config
    shape = (config.grad_accum_steps, config.batch_size, config.sequence + 1)
    where = run.mesh and spread.batch_sharding(run.mesh, shape)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)


def changes_bases(config: Config, state: TrainState, step: int, skipped: int) -> bool:
    """Returns whether GaLore, which counts the steps taken, changes its bases on one.

    Whether the step before, still in flight, is among the `skipped` is waited for only
    if the answer hangs on it.
    """
    if (step - skipped) % config.galore_update_freq > 1:
        return False
    return (step - int(state.guard.skipped)) % config.galore_update_freq == 0
