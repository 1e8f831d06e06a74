"""A training step that updates each layer in the backward pass."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float32, Int32

from nanochat_jax.optimizer.backward import passes
from nanochat_jax.optimizer.backward.by_part import by_part
from nanochat_jax.optimizer.backward.layout import layout_of
from nanochat_jax.optimizer.backward.loop import Loop
from nanochat_jax.optimizer.backward.microbatches import plus
from nanochat_jax.optimizer.backward.stacked import Stacked, number_of_layers
from nanochat_jax.optimizer.backward.updates import PartUpdates
from nanochat_jax.transforms import per_leaf, run_after


class StepReport(NamedTuple):
    """Facts about a step.

    Attributes:
      loss: Mean loss over microbatches.
      grad_norm: Norm of the mean gradient, before clipping.
      left_out: Parts that were not updated, for gradients that are not finite: layers,
        leaves of the head, and leaves of the embedding. All of them if the step was
        not taken.
    """

    loss: Float32[Array, ""]
    grad_norm: Float32[Array, ""]
    left_out: Int32[Array, ""]


class BackwardStep(NamedTuple):
    """A training step as two pure functions.

    Attributes:
      init: Function from parameters to the state of the optimizer.
      step: Function of parameters, state and batch, to the new parameters, the new
        state and a `StepReport`. Jit it with `donate_argnums=(0, 1)`. It takes the
        keyword `take`, a function from the loss to whether the step is taken, by
        default if it is finite.
    """

    init: Callable[[Any], optax.OptState]
    step: Callable[..., tuple[Any, optax.OptState, StepReport]]


def update_in_backward(
    embed: Callable[[Any, Any], Any],
    block: Callable[[Any, Any], Any],
    head: Callable[[Any, Any, Any], Array],
    tx: optax.GradientTransformation,
    rest_tx: optax.GradientTransformation | None = None,
    *,
    stack: str = "blocks",
    segment: int = 1,
    microbatches: bool = False,
) -> BackwardStep:
    """Returns a training step that updates each layer as soon as it has its gradient.

    The forward pass keeps the hidden states before each layer. The backward pass goes
    from the last layer to the first: it recomputes the layer, takes its gradient,
    updates its parameters and its part of the state in place, and forgets the gradient.
    So gradients, float32 copies and updates of one layer are in memory at a time, as in
    LOMO (Lv et al. 2023) and in GaLore's per-layer updates (Zhao et al. 2024, section
    4.3), and for any transformation.

    Parameters are a dict of the blocks, stacked `[L, ...]`, and of the rest. The state
    is that of `tx.init`, and updates are those of `tx.update`, so that a run may change
    from one kind of step to the other. `tx` must treat every layer, and every leaf, by
    itself: what is computed from all leaves, such as the global norm by which a clip
    divides, is here computed from the leaves that are updated together, those of one
    layer, of the head or of the embedding. Transformations are told the index of the
    layer by the extra argument `layer`.

    A step whose loss is not finite is not taken. Where gradients of a part are not
    finite, that part keeps parameters and state to the bit.

    Example:
      >>> embed = lambda rest, batch: batch["x"] @ rest["in"]
      >>> block = lambda layer, x: x + jnp.tanh(x @ layer["kernel"])
      >>> head = lambda rest, x, batch: jnp.mean((x @ rest["out"] - batch["y"]) ** 2)
      >>> tx = optax.chain(momentum(), orthogonalize(), optax.scale(-0.02))
      >>> init, step = update_in_backward(embed, block, head, tx, optax.adam(1e-3))
      >>> params = {"blocks": {"kernel": jnp.ones((6, 16, 16)) / 16}}
      >>> params |= {"in": jnp.ones((8, 16)), "out": jnp.ones((16, 4))}
      >>> batch = {"x": jnp.ones((32, 8)), "y": jnp.ones((32, 4))}
      >>> step = jax.jit(step, donate_argnums=(0, 1))
      >>> params, state, report = step(params, init(params), batch)
      >>> int(report.left_out)
      0

    Args:
      embed: Function of the parameters outside the stack, a dict, and a batch, to the
        hidden states before the first layer, any tree of arrays.
      block: Function of the parameters of one layer and the hidden states before it, to
        those after it.
      head: Function of the parameters outside the stack, the last hidden states and the
        batch, to the loss.
      tx: Optimizer of all parameters, or of the stack if there is a second one.
      rest_tx: Optimizer of the parameters outside the stack.
      stack: Key of the stacked blocks.
      segment: Layers of a segment. Hidden states are kept before each segment, and
        before each layer of one segment at a time; more than 1 takes one more forward
        pass.
      microbatches: Whether the leaves of a batch have an axis of microbatches before
        all others. All of them go through a layer before the next, and gradients of one
        layer at a time are added up, in float32.

    Returns:
      The functions `init` and `step`.

    Raises:
      ValueError: If `segment` does not divide the layers; if leaves of the stack differ
        in their first axis; if the state has no entry for each layer, as that of
        `optax.adafactor`, which has placeholders.
    """
    if rest_tx is not None:
        tx = by_part(tx, rest_tx, stack)
    tx = per_leaf(tx)
    model = passes.Model(embed, block, head)

    def step(
        params: dict[str, Any],
        state: optax.OptState,
        batch: Any,
        *,
        take: Callable[[Array], Bool[Array, ""]] = jnp.isfinite,
    ) -> tuple[dict[str, Any], optax.OptState, StepReport]:
        if stack not in params:
            raise ValueError(
                f"`stack` is {stack!r}, which parameters lack. They have {[*params]}."
            )
        items = batch if microbatches else jax.tree.map(lambda x: x[None], batch)
        layers = number_of_layers(params[stack], stack)
        if layers % segment:
            raise ValueError(
                f"`segment` must divide the number of layers, {layers}, got {segment}."
            )
        return _step(model, tx, stack, segment, params, state, items, take)

    return BackwardStep(tx.init, step)


def _step(
    model: passes.Model,
    tx: optax.GradientTransformation,
    stack: str,
    segment: int,
    params: dict[str, Any],
    state: optax.OptState,
    batch: Any,
    take: Callable[[Array], Array],
) -> tuple[dict[str, Any], optax.OptState, StepReport]:
    """Returns parameters, state and report after a step over microbatches."""
    rest = {key: x for key, x in params.items() if key != stack}
    blocks = Stacked.of(params[stack])
    like, first, one = jax.eval_shape(
        lambda: (rest, *jax.tree.map(lambda x: x[0], (batch, params[stack])))
    )
    hidden = jax.eval_shape(model.embed, rest, first)
    passes.check(model, rest, one, hidden, first)
    by_embed, by_head = _readers(model, rest, hidden, first)
    embed = lambda read, item: model.embed(passes.filled(like, read), item)
    x = passes.each(embed, passes.only(rest, by_embed), batch)
    x, kept = passes.forward(model.block, blocks, x, segment)
    read = passes.only(rest, by_head)
    head = functools.partial(passes.head_gradients, model.head, like)
    loss, head_grads, dx = run_after(head, read, x, batch, result=x)

    updates = _updates(tx, stack, params, state, take(loss), loss)
    updates = updates.with_marker(updates.tree(head_grads))
    # What the embedding does not read, a head of its own, has all of its gradient.
    early = jax.tree.map(lambda read: not read, by_embed)
    grads = updates.tree(passes.only(head_grads, early))
    params, nodes, tally = updates.of_leaves(
        updates.tally, grads, updates.nodes, params
    )
    loop = Loop(model.block, updates, stack, segment)
    dx, params, nodes, tally = loop.run(kept, dx, params, nodes, tally)

    read = passes.only(rest, by_embed)
    embed_grads = passes.embed_gradients(model.embed, like, read, batch, dx)
    both = lambda g, h: g if h is None else plus(g, h)
    grads = updates.tree(
        jax.tree.map(both, embed_grads, passes.only(head_grads, by_embed))
    )
    params, nodes, tally = updates.of_leaves(tally, grads, nodes, params)
    report = StepReport(loss, jnp.sqrt(tally.squares), tally.left_out)
    return params, updates.state(nodes, tally), report


def _updates(
    tx: optax.GradientTransformation,
    stack: str,
    params: dict[str, Any],
    state: optax.OptState,
    take: Array,
    loss: Array,
) -> PartUpdates:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    layout = layout_of(tx, shapes, stack)
    nodes = layout.treedef.flatten_up_to(state)
    return PartUpdates(tx, shapes, layout, nodes, take, loss)


def _readers(model: passes.Model, rest: Any, x: Any, batch: Any) -> tuple[Any, Any]:
    """Returns which parameters embedding and head read.

    One that neither reads counts to the embedding: its gradient is zero.
    """
    by_head = passes.readers(model.head, rest, x, batch)
    by_embed = passes.readers(model.embed, rest, batch)
    late = lambda embed, head: embed or not head
    return jax.tree.map(late, by_embed, by_head), by_head
