"""The pure training step, its state, and their compilation.

The ordinary step takes the mean gradient over microbatches, `guard.judge` decides
whether it is taken, and the update of the optimizer is then applied. The other one
updates each layer in the backward pass.

Axes: A microbatches, B sequences, S tokens of a sequence.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from nanochat_jax.lm.checkpoints import open_source
from nanochat_jax.lm.model import (
    activation_sharding,
    as_functions,
    clip_attention,
    count_predictions,
    gpt,
    largest_scores,
    next_token_loss,
)
from nanochat_jax.lm.training import guard
from nanochat_jax.lm.training.accumulate import mean_gradient
from nanochat_jax.lm.training.run import Run
from nanochat_jax.optimizer import roles, state_sharding, update_in_backward
from nanochat_jax.transforms import apply_if

TrainStep = Callable[["TrainState", Array], tuple["TrainState", dict[str, Array]]]


class TrainState(NamedTuple):
    """All that changes in training; data and random keys follow from the step.

    Attributes:
      step: Steps done, those that were skipped among them.
      params: Parameters of the model.
      opt_state: State of the optimizer.
      guard: Counts of skipped steps, and running statistics of loss and norm.
    """

    step: Int32[Array, ""]
    params: gpt.Params
    opt_state: optax.OptState
    guard: guard.Guard


def init_state(run: Run) -> TrainState:
    """Returns the state before the first step, each array made where it belongs.

    Parameters are random, or of the model `init_from`, and the state of the optimizer
    is that of its `init` for them.

    Args:
      run: The run.

    Raises:
      ValueError: If the model to start from is not there, or has other settings.
    """
    where = state_shardings(run)
    params = _first_params(run)
    init_opt_state = jax.jit(run.tx.init, out_shardings=where and where.opt_state)
    init_guard = jax.jit(guard.init, out_shardings=where and where.guard)
    step = jnp.zeros([], jnp.int32, device=where and where.step)
    return TrainState(step, params, init_opt_state(params), init_guard())


def _first_params(run: Run) -> gpt.Params:
    """Returns random parameters, or those of the model that a run starts from."""
    config = run.config
    if config.init_from is not None:
        source = run.source or open_source(config.init_from)
        source.check(config)
        return source.read(config, run.params)
    where = state_shardings(run)
    init_params = lambda: gpt.init(config, config.seed)[1]
    return jax.jit(init_params, out_shardings=where and where.params)()


def make_train_step(
    graphdef: nnx.GraphDef[gpt.GPT],
    tx: optax.GradientTransformationExtraArgs,
    *,
    spike_skip: float = 0.0,
    frozen: Collection[str] = (),
) -> TrainStep:
    """Returns the pure function of one step, to be jitted with its state donated.

    It takes a state and a batch, int32 `[A, B, S + 1]`, and returns the next state and
    the metrics `loss`, in nats a token, `grad_norm`, before clipping, `skipped`, the
    number of steps skipped so far, and `consecutive_skips`, up to this step.

    Args:
      graphdef: Structure of the model.
      tx: The optimizer.
      spike_skip: As for `guard.judge`.
      frozen: Paths of parameters without a gradient, from `roles.frozen_by`.
    """

    def train_step(
        state: TrainState, batch: Int32[Array, "A B S+1"]
    ) -> tuple[TrainState, dict[str, Array]]:
        step, params, opt_state, watched = state
        each = _predictions_each(batch)
        loss_fn = lambda params, batch: next_token_loss(
            graphdef, roles.stop_gradients(params, frozen), batch, each
        )
        loss, grads = mean_gradient(loss_fn, params, batch)
        norm = optax.tree.norm(grads)
        take, watched = guard.judge(watched, loss, norm, spike_skip)
        params, opt_state = apply_if(take, tx, grads, opt_state, params, value=loss)
        after = TrainState(step + 1, params, opt_state, watched)
        return after, _metrics(loss, norm, watched)

    return train_step


def make_backward_step(
    graphdef: nnx.GraphDef[gpt.GPT],
    params: gpt.Params,
    tx: optax.GradientTransformationExtraArgs,
    *,
    spike_skip: float = 0.0,
    segment: int = 1,
    frozen: Collection[str] = (),
) -> TrainStep:
    """Returns the step that updates each layer in the backward pass.

    It is otherwise as that of `make_train_step`, with the same state.

    Args:
      graphdef: Structure of the model, with `scan_layers`.
      params: Shapes of its parameters.
      tx: The optimizer.
      spike_skip: As for `guard.judge_loss`.
      segment: As for `update_in_backward`.
      frozen: As for `make_train_step`.
    """
    embed, block, head = as_functions(graphdef, params)
    held = lambda rest: roles.stop_gradients(rest, frozen)
    held_layer = lambda layer: roles.stop_gradients(layer, frozen, "['blocks']")
    _, update = update_in_backward(
        lambda rest, batch: embed(held(rest), batch),
        lambda params, x: block(held_layer(params), x),
        lambda rest, x, batch: head(held(rest), x, batch),
        tx,
        segment=segment,
        microbatches=True,
    )

    def train_step(
        state: TrainState, batch: Int32[Array, "A B S+1"]
    ) -> tuple[TrainState, dict[str, Array]]:
        step, params, opt_state, watched = state
        take = lambda loss: guard.judge_loss(watched, loss, spike_skip)
        items = (batch, jnp.full(len(batch), _predictions_each(batch)))
        params, opt_state, report = update(params, opt_state, items, take=take)
        loss, norm = report.loss, report.grad_norm
        counted = guard.count(watched, report.left_out == 0, loss, norm)
        after = TrainState(step + 1, params, opt_state, counted)
        return after, _metrics(loss, norm, counted)

    return train_step


def with_qk_clip(
    train_step: TrainStep,
    graphdef: nnx.GraphDef[gpt.GPT],
    threshold: float,
    interval: int,
) -> TrainStep:
    """Returns a step after some of which attention scores are clipped.

    After every `interval` steps the largest scores of the first microbatch are found in
    one more forward pass, and `clip_attention` brings them down. The metric
    `largest_score` is the largest of them, 0 after other steps.

    Args:
      train_step: The step.
      graphdef: Structure of the model.
      threshold: Largest score to keep.
      interval: Steps between two clips.
    """

    def clipping_step(
        state: TrainState, batch: Int32[Array, "A B S+1"]
    ) -> tuple[TrainState, dict[str, Array]]:
        state, metrics = train_step(state, batch)
        measure = lambda params: largest_scores(graphdef, params, batch[0, :, :-1])
        shape = jax.eval_shape(measure, state.params)
        unknown = lambda _: jnp.zeros(shape.shape, shape.dtype)
        due = state.step % interval == 0
        largest = jax.lax.cond(due, measure, unknown, state.params)
        params = clip_attention(state.params, largest, threshold)
        metrics = {**metrics, "largest_score": largest.max()}
        return state._replace(params=params), metrics

    return clipping_step


def _predictions_each(batch: Int32[Array, "A B S+1"]) -> Array:
    """Returns the predictions of a microbatch on average.

    Divided by it, losses of microbatches have a mean over all predictions, also where
    some have fewer than others.
    """
    return count_predictions(batch) / len(batch)


def _metrics(loss: Array, norm: Array, watched: guard.Guard) -> dict[str, Array]:
    return {
        "loss": loss,
        "grad_norm": norm,
        "skipped": watched.skipped,
        "consecutive_skips": watched.consecutive_skips,
    }


def compile_train_step(run: Run) -> jax.stages.Compiled:
    """Compiles the step of a run for its shapes, its state donated.

    Args:
      run: The run.
    """
    config = run.config
    frozen = roles.frozen_by(config.freeze, run.params, config.groups)
    if config.update_in_backward:
        step = make_backward_step(
            run.graphdef,
            run.params,
            run.tx,
            spike_skip=config.spike_skip,
            segment=config.remat_segment,
            frozen=frozen,
        )
    else:
        step = make_train_step(
            run.graphdef, run.tx, spike_skip=config.spike_skip, frozen=frozen
        )
    if config.qk_clip:
        _require_trained(frozen)
        step = with_qk_clip(step, run.graphdef, config.qk_clip, config.qk_clip_interval)
    where = state_shardings(run)
    out = where and (where, where.step)  # metrics are whole on every device
    jitted = jax.jit(step, donate_argnums=0, out_shardings=out)
    with activation_sharding.using(run.mesh):
        return jitted.lower(abstract_state(run), _abstract_batch(run)).compile()


def _require_trained(frozen: Collection[str]) -> None:
    """Refuses to clip kernels of queries and keys that are frozen."""
    names = ("['query']['kernel']", "['key']['kernel']")
    held = [name for name in frozen if name.endswith(names)]
    if held:
        raise ValueError(
            "`qk_clip` scales the kernels of queries and keys, but these are frozen: "
            f"{', '.join(held)}. Leave one of the two out."
        )


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
