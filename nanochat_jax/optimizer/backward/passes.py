"""Forward and backward pass through a stack of blocks, one layer at a time.

Axes: A microbatches, L layers, G segments of `L / G` layers. Hidden states `x` are any
tree of arrays, here with an axis A before theirs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import keystr

from nanochat_jax.optimizer.backward.microbatches import mean_over
from nanochat_jax.optimizer.backward.stacked import Stacked
from nanochat_jax.transforms import to_bits


class Model(NamedTuple):
    """A model around a stack of blocks, as functions.

    Attributes:
      embed: Function of the parameters outside the stack and a batch, to hidden states.
      block: Function of the parameters of one layer and hidden states, to the next.
      head: Function of the parameters outside the stack, hidden states and the batch,
        to the loss.
    """

    embed: Callable[[Any, Any], Any]
    block: Callable[[Any, Any], Any]
    head: Callable[[Any, Any, Any], jax.Array]


def check(model: Model, rest: Any, layer: Any, x: Any, batch: Any) -> None:
    """Refuses functions that do not fit together.

    Args:
      model: The functions.
      rest: Parameters outside the stack.
      layer: Shapes of the parameters of one layer.
      x: Hidden states of a microbatch.
      batch: A microbatch.

    Raises:
      ValueError: If hidden states are not floats, a block changes their shapes or
        types, or the loss is not a number.
    """
    shapes = lambda tree: {
        keystr(path) or "hidden states": f"{x.dtype.name}{list(x.shape)}"
        for path, x in jax.tree.leaves_with_path(tree)
    }
    whole = {
        name: shape
        for name, shape in shapes(x).items()
        if not shape.startswith(("float", "bfloat"))
    }
    if whole:
        raise ValueError(
            f"hidden states must be floats, got {whole}. Let `block` make positions "
            "and masks itself, from the shapes of hidden states."
        )
    before, after = shapes(x), shapes(jax.eval_shape(model.block, layer, x))
    if before != after:
        raise ValueError(
            "`block` must return hidden states of the shapes and types it is given, "
            f"{before}, got {after}."
        )
    loss = jax.eval_shape(model.head, rest, x, batch)
    if jnp.shape(loss) != ():
        raise ValueError(f"`head` must return one number, got shape {jnp.shape(loss)}.")


def each(f: Callable[[Any, Any], Any], params: Any, items: Any) -> Any:
    """Returns `f(params, item)` for the microbatches, `[A, ...]`, one at a time."""
    return mean_over(lambda params, item: ((), f(params, item)), params, items)[1]


def forward(
    block: Callable[[Any, Any], Any], blocks: Stacked, x: Any, segment: int
) -> tuple[Any, Any]:
    """Returns the last hidden states, and the bits of the first ones of each segment.

    Args:
      block: As in `Model`.
      blocks: Parameters of the layers.
      x: First hidden states.
      segment: Layers of a segment.
    """

    def run(carry: Any, start: Any) -> tuple[Any, Any]:
        # As bits, of which a compiler for processors makes no copy in float32.
        blocks, x = carry
        after, _ = inputs_of(block, blocks, x, start, segment)
        return after, jax.tree.map(to_bits, x)

    starts = jnp.arange(0, blocks.layers, segment)
    (_, x), kept = jax.lax.scan(run, (blocks, x), starts)
    return x, kept


def inputs_of(
    block: Callable[[Any, Any], Any], blocks: Stacked, x: Any, start: Any, segment: int
) -> tuple[tuple[Stacked, Any], Any]:
    """Returns the blocks, and hidden states after a segment and before its layers.

    Args:
      block: As in `Model`.
      blocks: Parameters of the layers.
      x: First hidden states of the segment, `[A, ...]`.
      start: Its first layer.
      segment: Its layers.
    """

    def through(carry: Any, i: Any) -> tuple[Any, Any]:
        blocks, x = carry
        layer, blocks = blocks.read(start + i)
        return (blocks, each(block, layer, x)), x

    if segment == 1:
        carry, x = through((blocks, x), 0)
        return carry, jax.tree.map(lambda x: x[None], x)
    return jax.lax.scan(through, (blocks, x), jnp.arange(segment))


def head_gradients(
    head: Callable[[Any, Any, Any], jax.Array], like: Any, read: Any, x: Any, batch: Any
) -> tuple[jax.Array, Any, Any]:
    """Returns mean loss, mean gradients of leaves, and gradients of hidden states.

    Args:
      head: As in `Model`.
      like: Shapes of the parameters outside the stack.
      read: Those of them that it reads, others absent.
      x: Last hidden states.
      batch: Microbatches.
    """

    def evaluate(read: Any, item: Any) -> tuple[Any, Any]:
        x, batch = item
        loss_of = lambda read, x: head(filled(like, read), x, batch)
        loss, pull = jax.vjp(loss_of, read, x)
        grads, dx = pull(jnp.ones_like(loss))
        return (loss, grads), dx

    (loss, grads), dx = mean_over(evaluate, read, (x, batch))
    return loss, grads, dx


def layer_gradients(
    block: Callable[[Any, Any], Any], params: Any, x: Any, dx: Any
) -> tuple[Any, Any]:
    """Returns the mean gradients of a layer, and gradients of its hidden states.

    Args:
      block: As in `Model`.
      params: Parameters of the layer.
      x: Hidden states before it.
      dx: Gradients of those after it.
    """

    def evaluate(params: Any, item: Any) -> tuple[Any, Any]:
        x, dx = item
        return jax.vjp(block, params, x)[1](dx)

    return mean_over(evaluate, params, (x, dx))


def embed_gradients(
    embed: Callable[[Any, Any], Any], like: Any, read: Any, batch: Any, dx: Any
) -> Any:
    """Returns the mean gradients of leaves by way of the first hidden states.

    Args:
      embed: As in `Model`.
      like: Shapes of the parameters outside the stack.
      read: Those of them that it reads, others absent.
      batch: Microbatches.
      dx: Gradients of the first hidden states.
    """

    def evaluate(read: Any, item: Any) -> tuple[Any, Any]:
        batch, dx = item
        first = lambda read: embed(filled(like, read), batch)
        return jax.vjp(first, read)[1](dx)[0], ()

    return mean_over(evaluate, read, (batch, dx))[0]


def readers(f: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Returns a tree with whether a function of it reads a leaf.

    Args:
      f: The function; it is traced.
      tree: Its first argument.
      *others: Its further arguments.
    """
    jaxpr = jax.make_jaxpr(f)(tree, *others).jaxpr
    read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars}
    read |= {id(v) for v in jaxpr.outvars}
    treedef = jax.tree.structure(tree)
    leaves = jaxpr.invars[: treedef.num_leaves]
    return treedef.unflatten(id(v) in read for v in leaves)


def only(tree: Any, mask: Any) -> Any:
    """Returns a tree with the leaves that a mask chooses, others absent."""
    return jax.tree.map(lambda chosen, x: x if chosen else None, mask, tree)


def filled(like: Any, part: Any) -> Any:
    """Returns a part of a tree with zeros for its absent leaves, which nothing reads.

    Args:
      like: Shapes of the tree.
      part: The part.
    """
    fill = lambda x, like: jnp.zeros(like.shape, like.dtype) if x is None else x
    return jax.tree.map(fill, part, like, is_leaf=lambda x: x is None)


def merged(tree: Any, part: Any) -> Any:
    """Returns a tree with the leaves of a part of it in their places."""
    put = lambda old, new: old if new is None else new
    return jax.tree.map(put, tree, part, is_leaf=lambda x: x is None)
