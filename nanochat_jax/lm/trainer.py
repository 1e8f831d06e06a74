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
from nanochat_jax.lm.checkpoint import Checkpoints, check_meta
from nanochat_jax.lm.data import eval_batches
from nanochat_jax.lm.display import Display
from nanochat_jax.lm.metrics import MetricsWriter
from nanochat_jax.lm.setup import Run, train_batches
from nanochat_jax.optimizer import schedule

# Settings under which a resumed run may differ and still be the same run.
RESUMABLE = (
    "checkpoint_interval",
    "data_path",  # the ids themselves must agree
    "eval_batches",
    "eval_interval",
    "keep_last_checkpoints",
    "log_interval",
    "sample_prompt",
    "sample_tokens",
    "tokenizer",
)

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
    graphdef: nnx.GraphDef[model.GPT], tx: optax.GradientTransformationExtraArgs
) -> TrainStep:
    """Returns the pure function of one step, to be jitted with its state donated.

    It takes a state and a batch, int32 `[A, B, S + 1]`, and returns the next state and
    the metrics `loss`, in nats a token, and `grad_norm`, before clipping.
    """
    loss_fn = lambda params, batch: model.next_token_loss(graphdef, params, batch)

    def train_step(
        state: TrainState, batch: Int32[Array, "A B S+1"]
    ) -> tuple[TrainState, dict[str, Array]]:
        loss, grads = _mean_gradient(loss_fn, state.params, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
        params: Any = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def compile_train_step(run: Run) -> jax.stages.Compiled:
    """Compiles the step of a run for its shapes, its state donated."""
    config, step = run.config, make_train_step(run.graphdef, run.tx)
    shape = (config.grad_accum_steps, config.batch_size, config.sequence + 1)
    batch = jax.ShapeDtypeStruct(shape, jnp.int32)
    return jax.jit(step, donate_argnums=0).lower(abstract_state(run), batch).compile()


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


def restore(run: Run, checkpoints: Checkpoints) -> TrainState:
    """Restores the latest state, if it is one of this run.

    Args:
      run: The run to resume.
      checkpoints: Where its states are.

    Returns:
      The state, bit for bit as it was saved.

    Raises:
      ValueError: If there is none, or it was saved with other settings or data.
    """
    stored = checkpoints.read_meta()
    check_meta(stored, run.meta, ignore=[f"config.{name}" for name in RESUMABLE])
    return checkpoints.restore(abstract_state(run))


def fit(
    run: Run,
    state: TrainState,
    train_step: jax.stages.Compiled,
    *,
    display: Display,
    metrics: MetricsWriter | None = None,
    checkpoints: Checkpoints | None = None,
) -> TrainState:
    """Trains from `state` to the last step of the run.

    Args:
      run: What to train.
      state: Where to begin; it is donated.
      train_step: The compiled step, from `compile_train_step`.
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
        display.log(values)
        if metrics is not None:
            metrics.write(values)

    if first == 0:
        report({"step": 0, **evaluate(state.params)})
    started = logged = time.perf_counter()
    since = first  # step of the last report, from which the speed is counted
    previous = None
    for step, batch in train_batches(config, run.corpus).prefetch(first, total):
        state, values = train_step(state, batch.reshape(shape))
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


def _mean_gradient(
    loss_fn: Callable[[model.Params, Array], Array], params: model.Params, batch: Array
) -> tuple[Array, model.Params]:
    """Returns mean loss and gradient over the microbatches, one at a time."""
    value_and_grad = jax.value_and_grad(loss_fn)
    if batch.shape[0] == 1:
        return value_and_grad(params, batch[0])

    def add(total: Any, microbatch: Array) -> tuple[Any, None]:
        part = value_and_grad(params, microbatch)
        return jax.tree.map(jnp.add, total, part), None

    zero = (jnp.zeros([], jnp.float32), optax.tree.zeros_like(params))
    total, _ = jax.lax.scan(add, zero, batch)
    return jax.tree.map(lambda x: x / batch.shape[0], total)


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
