"""Training: one pure compiled step, and the loop around it.

A batch goes from the file to a parameter update through four files: `data.Batches`
cuts it from the corpus, `model.next_token_loss` turns it into a loss, the transforms
of `build_optimizer` turn the gradient into an update, and `make_train_step` here adds
it to the parameters.

Axes: A microbatches, B sequences, S tokens of a sequence.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float32, Int32

from nanochat_jax.lm import model
from nanochat_jax.lm.accumulate import mean_gradient
from nanochat_jax.lm.checkpoint import Checkpoints
from nanochat_jax.lm.data import eval_batches
from nanochat_jax.lm.display import Display
from nanochat_jax.lm.metrics import MetricsWriter
from nanochat_jax.lm.resume import convert_state, describe_change, stored_run
from nanochat_jax.lm.setup import Run, train_batches
from nanochat_jax.optimizer import schedule
from nanochat_jax.transforms import project_gradients

TrainStep = Callable[["TrainState", Array], tuple["TrainState", dict[str, Array]]]


class TrainState(NamedTuple):
    """All that changes in training; data and random keys follow from the step.

    Attributes:
      step: Steps taken.
      params: Parameters of the model, float32.
      opt_state: State of the optimizer.
    """

    step: Int32[Array, ""]
    params: model.Params
    opt_state: optax.OptState


def init_state(run: Run) -> TrainState:
    """Returns the state before the first step."""
    _, params = jax.jit(lambda: (None, model.init(run.config, run.config.seed)[1]))()
    return TrainState(jnp.zeros([], jnp.int32), params, jax.jit(run.tx.init)(params))


def make_train_step(
    graphdef: nnx.GraphDef[model.GPT],
    tx: optax.GradientTransformationExtraArgs,
    *,
    low_rank: bool = False,
) -> TrainStep:
    """Returns the pure function of one step, to be jitted with its state donated.

    It takes a state and a batch, int32 `[A, B, S + 1]`, and returns the next state and
    the metrics `loss`, in nats a token, and `grad_norm`, before clipping. With
    `low_rank`, for steps that change none of GaLore's bases, gradients are added up as
    it projects them, and the norm is of these.
    """
    loss_fn = lambda params, batch: model.next_token_loss(graphdef, params, batch)

    def train_step(
        state: TrainState, batch: Int32[Array, "A B S+1"]
    ) -> tuple[TrainState, dict[str, Array]]:
        opt_state, params = state.opt_state, state.params
        extra: dict[str, Any] = {"projected": True} if low_rank else {}
        project = lambda grads: (
            project_gradients(tx, opt_state, grads, params) if low_rank else grads
        )
        loss, grads = mean_gradient(loss_fn, params, batch, project)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss, **extra)
        params: Any = optax.apply_updates(params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def compile_train_step(run: Run, *, low_rank: bool = False) -> jax.stages.Compiled:
    """Compiles the step of a run for its shapes, its state donated.

    Args:
      run: The run.
      low_rank: As for `make_train_step`.
    """
    config, step = run.config, make_train_step(run.graphdef, run.tx, low_rank=low_rank)
    shape = (config.grad_accum_steps, config.batch_size, config.sequence + 1)
    batch = jax.ShapeDtypeStruct(shape, jnp.int32)
    return jax.jit(step, donate_argnums=0).lower(abstract_state(run), batch).compile()


def compile_low_rank_step(run: Run) -> jax.stages.Compiled | None:
    """Compiles the step between two changes of bases, if it accumulates otherwise."""
    if not run.config.accumulates_low_rank:
        return None
    return compile_train_step(run, low_rank=True)


def abstract_state(run: Run) -> TrainState:
    """Returns shapes and types of the state of a run."""
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(count, run.params, jax.eval_shape(run.tx.init, run.params))


class Evaluator:
    """Validation loss of a run, on the same windows each time."""

    def __init__(self, run: Run):
        """Cuts the windows; nothing is compiled yet."""
        config = run.config
        self._bytes_per_token = run.corpus.bytes_per_token
        self._batches = eval_batches(
            run.corpus.val,
            batch_size=config.batch_size,
            seq_len=config.sequence,
            limit=config.eval_batches,
        )
        self._loss: Callable[[model.Params, np.ndarray], Float32[Array, ""]] = jax.jit(
            lambda params, batch: model.next_token_loss(run.graphdef, params, batch)
        )

    def __call__(self, params: model.Params) -> dict[str, float]:
        """Returns `val_loss`, and `val_bpb` if the bytes of a token are known."""
        loss = float(np.mean([self._loss(params, batch) for batch in self._batches]))
        if self._bytes_per_token is None:
            return {"val_loss": loss}
        return {
            "val_loss": loss,
            "val_bpb": loss / math.log(2) / self._bytes_per_token,
        }


def restore(
    run: Run,
    checkpoints: Checkpoints,
    *,
    allow_codec_change: bool = False,
    say: Callable[[str], object] = print,
) -> TrainState:
    """Restores the latest state, if it is one of this run.

    Args:
      run: The run to resume.
      checkpoints: Where its states are.
      allow_codec_change: Whether the optimizer's state may have been stored with other
        codecs, or none: it is then decoded, stored anew, and a line says so.
      say: What that line is given to.

    Returns:
      The state, bit for bit as it was saved if it is stored as it was.

    Raises:
      ValueError: If there is none, or it was saved with other settings or data.
    """
    old = stored_run(run, checkpoints.read_meta(), allow_codec_change)
    state = checkpoints.restore(abstract_state(old))
    if old is run:
        return state
    opt_state = convert_state(old, run, state.opt_state, state.step)
    say(f"{checkpoints.directory}: {describe_change(old, run)}.")
    return state._replace(opt_state=opt_state)


def fit(
    run: Run,
    state: TrainState,
    train_step: jax.stages.Compiled,
    *,
    low_rank_step: jax.stages.Compiled | None = None,
    display: Display,
    metrics: MetricsWriter | None = None,
    checkpoints: Checkpoints | None = None,
) -> TrainState:
    """Trains from `state` to the last step of the run.

    Args:
      run: What to train.
      state: Where to begin; it is donated.
      train_step: The compiled step, from `compile_train_step`.
      low_rank_step: The step for when no basis changes, from `compile_low_rank_step`.
      display: Where progress is shown.
      metrics: Where metrics are written, if anywhere.
      checkpoints: Where states are saved, if anywhere.

    Returns:
      The state after the last step.

    Raises:
      FloatingPointError: If the loss is not finite when it is logged.
    """
    config, evaluate = run.config, Evaluator(run)
    rate = schedule(config, config.lr)
    first, total = int(state.step), config.total_steps
    shape = (config.grad_accum_steps, config.batch_size, config.sequence + 1)

    def report(values: dict[str, Any]) -> None:
        values["tokens"] = values["step"] * config.tokens_per_step
        display.log(values)
        if metrics is not None:
            metrics.write(values)

    if first == 0:
        report({"step": 0, **evaluate(state.params)})
    started = logged = time.perf_counter()
    since = first  # step of the last report, from which the speed is counted
    previous = None
    for step, batch in train_batches(config, run.corpus).prefetch(first, total):
        changes = step % config.galore_update_freq == 0
        take_step = train_step if changes or not low_rank_step else low_rank_step
        state, values = take_step(state, batch.reshape(shape))
        # One step stays in flight while the host prepares the next.
        jax.block_until_ready(previous)
        previous, done = values, step + 1
        display.update(done)
        line: dict[str, Any] = {"step": done}
        if _due(done, config.log_interval, total):
            line |= {"loss": _finite(float(values["loss"]), done)}
            now = time.perf_counter()
            line |= {
                "lr": float(jnp.asarray(rate(step))),
                "grad_norm": float(values["grad_norm"]),
                "tokens_per_s": (done - since)
                * config.tokens_per_step
                / (now - logged),
                "elapsed_s": now - started,
            }
        if _due(done, config.eval_interval, total):
            line |= evaluate(state.params)
        if len(line) > 1:
            report(line)
            since, logged = done, time.perf_counter()
        if checkpoints and _due(done, config.checkpoint_interval, total):
            checkpoints.save(done, state, run.meta)
    return state


def _due(step: int, interval: int, total: int) -> bool:
    """Returns whether something done every `interval` steps, and last, is due."""
    return step == total or (interval > 0 and step % interval == 0)


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"step {step}: the loss is {loss}. Resume from an earlier checkpoint, or "
            "train with a lower `lr` or `fallback_lr`."
        )
    return loss
