"""The pure training step, its state, and their compilation.

`mean_gradient` evaluates the microbatches one by one, `guard.judge` decides whether the
step is taken, and `guard.update_if` then applies the update of the optimizer.

Axes: A microbatches, B sequences, S tokens of a sequence.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from nanochat_jax.lm.model import activation_sharding, gpt
from nanochat_jax.lm.training import guard
from nanochat_jax.lm.training.accumulate import mean_gradient
from nanochat_jax.lm.training.run import Run
from nanochat_jax.optimizer import state_sharding
from nanochat_jax.transforms import project_gradients

TrainStep = Callable[["TrainState", Array], tuple["TrainState", dict[str, Array]]]


class TrainState(NamedTuple):
    """All that changes in training; data and random keys follow from the step.

    Attributes:
      step: Steps done, those that were skipped among them.
      params: Parameters of the model, float32.
      opt_state: State of the optimizer.
      guard: Counts of skipped steps, and running statistics of loss and norm.
    """

    step: Int32[Array, ""]
    params: gpt.Params
    opt_state: optax.OptState
    guard: guard.Guard


def init_state(run: Run) -> TrainState:
    """Returns the state before the first step, each array made where it belongs."""
    where = state_shardings(run)
    init_params = lambda: gpt.init(run.config, run.config.seed)[1]
    params = jax.jit(init_params, out_shardings=where and where.params)()
    init_opt_state = jax.jit(run.tx.init, out_shardings=where and where.opt_state)
    init_guard = jax.jit(guard.init, out_shardings=where and where.guard)
    step = jnp.zeros([], jnp.int32, device=where and where.step)
    return TrainState(step, params, init_opt_state(params), init_guard())


def make_train_step(
    graphdef: nnx.GraphDef[gpt.GPT],
    tx: optax.GradientTransformationExtraArgs,
    *,
    spike_skip: float = 0.0,
    low_rank: bool = False,
) -> TrainStep:
    """Returns the pure function of one step, to be jitted with its state donated.

    It takes a state and a batch, int32 `[A, B, S + 1]`, and returns the next state and
    the metrics `loss`, in nats a token, `grad_norm`, before clipping, `skipped`, the
    number of steps skipped so far, and `consecutive_skips`, up to this step.

    Args:
      graphdef: Structure of the model.
      tx: The optimizer.
      spike_skip: As for `guard.judge`.
      low_rank: For steps that change none of GaLore's bases: gradients are added up as
        it projects them, and the norm is of these.
    """
    loss_fn = lambda params, batch: gpt.next_token_loss(graphdef, params, batch)

    def train_step(
        state: TrainState, batch: Int32[Array, "A B S+1"]
    ) -> tuple[TrainState, dict[str, Array]]:
        step, params, opt_state, watched = state
        extra: dict[str, Any] = {"projected": True} if low_rank else {}
        project = lambda grads: (
            project_gradients(opt_state, grads) if low_rank else grads
        )
        loss, grads = mean_gradient(loss_fn, params, batch, project)
        norm = optax.tree.norm(grads)
        take, watched = guard.judge(watched, loss, norm, spike_skip)
        update = functools.partial(tx.update, value=loss, **extra)
        params, opt_state = guard.update_if(take, update, grads, opt_state, params)
        metrics = {"loss": loss, "grad_norm": norm}
        metrics |= {
            "skipped": watched.skipped,
            "consecutive_skips": watched.consecutive_skips,
        }
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
    where = state_shardings(run)
    out = where and (where, where.step)  # metrics are whole on every device
    jitted = jax.jit(step, donate_argnums=0, out_shardings=out)
    with activation_sharding.using(run.mesh):
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
    where = state_shardings(run)
    return state if where is None else jax.tree.map(at, state, where)


def state_shardings(run: Run) -> Any:
    """Returns a `TrainState` of shardings, or `None` without a mesh."""
    if run.mesh is None:
        return None
    whole = NamedSharding(run.mesh, PartitionSpec())
    params: Any = jax.tree.map(lambda x: x.sharding, run.params)
    watched: Any = jax.tree.map(lambda _: whole, jax.eval_shape(guard.init))
    count: Any = whole
    return TrainState(count, params, state_sharding(run.tx, run.params), watched)


def _abstract_batch(run: Run) -> jax.ShapeDtypeStruct:
    """Returns shape and type of a batch, and where it is on a mesh."""
    config = run.config
    shape = (config.grad_accum_steps, config.batch_size, config.sequence + 1)
    where = run.mesh and activation_sharding.batch_sharding(run.mesh, shape)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)
