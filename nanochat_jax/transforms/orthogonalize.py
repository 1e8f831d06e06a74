"""Orthogonalised updates: the step that makes momentum into Muon."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array

from nanochat_jax.numerics import (
    QUINTIC,
    Form,
    Fractions,
    Method,
    Polynomials,
    newton_schulz,
    resolve_dtype,
    resolve_form,
    zolotarev,
)
from nanochat_jax.transforms import checks, precision
from nanochat_jax.transforms.scheduling import (
    by_rows,
    group_by_shape,
    group_bytes,
    piece_bytes,
)
from nanochat_jax.transforms.sharding import (
    NOWHERE,
    Placement,
    in_auto_mode,
    whole_matrices,
)

ShapeScale = Literal["width", "rms", "none"]

Iteration = Callable[[Array], Array]
"""A function from whole matrices, `[*batch, m, n]`, to semi-orthogonal ones."""


def orthogonalize(
    polynomials: Method | Iteration = QUINTIC,
    *,
    dtype: str = "auto",
    form: Form = "auto",
    max_bytes: int | None = None,
    max_matrix_bytes: int = 1 << 30,
) -> optax.GradientTransformationExtraArgs:
    """Replaces each matrix of the updates by the nearest semi-orthogonal one.

    The last two axes are the matrix; the axes before them are a batch. Leaves of one
    shape are stacked, and iterated on a few matrices at a time in a loop, which is
    compiled once for the stack. Stateless, so Muon is
    `optax.chain(momentum(), orthogonalize(), scale_by_shape("width"), ...)`.

    Where it is known how the parameters are sharded, on a mesh of Explicit axes or
    under `distribute`, each device iterates on some whole matrices of a stack: one
    all-to-all brings them there and one takes the results back, in bfloat16 if that is
    the type of the iteration, and nothing is sent in between.

    Example:
      >>> tx = orthogonalize(POLYNOMIALS["polar_express_5"], dtype="float32")
      >>> params = {"a": jnp.ones((8, 16)), "b": jnp.ones((8, 16))}
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> def by_decomposition(x):  # a function of one's own for Newton-Schulz
      ...     u, _, vt = jnp.linalg.svd(x, full_matrices=False)
      ...     return u @ vt
      >>> updates, _ = orthogonalize(by_decomposition).update(params, tx.init(params))

    Args:
      polynomials: Newton-Schulz polynomials, one for each step; or fractions, as for
        `zolotarev`; or a function in place of the iteration, which is given whole
        matrices, `[n, rows, columns]`, in the type of the updates, and returns as many
        of that shape and type.
      dtype: Type of the iteration; the updates keep theirs. "auto" is bfloat16 where
        it is native, as for `resolve_dtype`, and float32 for fractions.
      form: Form of Newton-Schulz; see `newton_schulz`.
      max_bytes: Most float32 bytes of the matrices iterated on at a time; a larger
        matrix is alone. A stack is as large as that and as what `sequence` takes
        together. By default it is half of the latter on a processor, which is no faster
        on more, and all of it elsewhere. On several devices it is for each of them.
      max_matrix_bytes: Most float32 bytes of a sharded matrix that one device is given
        whole. All devices iterate on a larger one together, each on some of its
        columns, and add up a Gram matrix in each step. A function of one's own is given
        whole ones of any size.

    Returns:
      A stateless transformation.

    Raises:
      ValueError: If `form` is not safe in `dtype`, either is given for a function, or
        fractions are to run in another type than float32; at `update`, if a leaf has
        fewer than two axes, or a function changes shape or type.
    """
    own = not isinstance(polynomials, Method)
    if isinstance(polynomials, Fractions) and dtype == "auto":
        dtype = "float32"
    iterate = _iteration(polynomials, dtype, form)

    def most() -> int:
        return piece_bytes() if max_bytes is None else max_bytes

    def iterate_in_parts(stack: Array) -> Array:
        return by_rows(iterate, stack, max_bytes=most())

    def iterate_together(
        leaves: Sequence[Array], sharding: NamedSharding | None
    ) -> Sequence[Array]:
        if not leaves[0].size:
            return leaves
        if sharding is None or sharding.mesh.size == 1:
            stack = jnp.stack(leaves)
            done = iterate_in_parts(stack.reshape(-1, *stack.shape[-2:]))
            return list(done.reshape(stack.shape))
        if not own and 4 * math.prod(leaves[0].shape[-2:]) > max_matrix_bytes:
            work = lambda x, names: iterate(x, axis_name=names)
            return [whole_matrices.in_columns(work, x, sharding) for x in leaves]
        short = not own and resolve_dtype(dtype) == "bfloat16" and form != "gram"
        sent = "bfloat16" if short else leaves[0].dtype
        return whole_matrices.share_out(iterate_in_parts, leaves, sharding, sent)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        placement: Placement = NOWHERE,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        checks.require_matrices(updates, "orthogonalize")
        flat, treedef = jax.tree.flatten_with_path(precision.inexact(updates))
        leaves, places = [x for _, x in flat], [placement.sharding(*x) for x in flat]
        stack_bytes = max(most(), group_bytes())
        for group in group_by_shape(leaves, stack_bytes, places, placement.devices):
            done = iterate_together([leaves[i] for i in group], places[group[0]])
            for i, x in zip(group, done, strict=True):
                leaves[i] = x
        return treedef.unflatten(leaves), state

    return optax.GradientTransformationExtraArgs(
        optax.init_empty_state, in_auto_mode(update_fn)
    )


def scale_by_shape(mode: ShapeScale = "width") -> optax.GradientTransformation:
    """Scales each matrix of the updates by a function of its shape.

    Kernels are `[..., fan_in, fan_out]`, as in Flax:

      * `"width"`: `√max(1, fan_out / fan_in)` (Jordan 2024);
      * `"rms"`: `0.2 √max(fan_in, fan_out)`, the root mean square of an AdamW update
        (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2);
      * `"none"`: 1.

    It depends on the parameter's own shape, so it belongs outside `galore`.

    Args:
      mode: One of the above.

    Returns:
      A stateless transformation.

    Raises:
      ValueError: If `mode` is none of the above; at `update`, if a leaf has fewer than
        two axes.
    """
    rules = {
        "width": lambda fan_in, fan_out: math.sqrt(max(1.0, fan_out / max(fan_in, 1))),
        "rms": lambda fan_in, fan_out: 0.2 * math.sqrt(max(fan_in, fan_out)),
        "none": lambda fan_in, fan_out: 1.0,
    }
    if mode not in rules:
        raise ValueError(f"`mode` must be one of {list(rules)}, got {mode!r}.")

    def update_fn(
        updates: optax.Updates, params: optax.Params | None = None
    ) -> optax.Updates:
        del params
        checks.require_matrices(updates, "scale_by_shape")
        scale = lambda x: x * rules[mode](*x.shape[-2:])
        return jax.tree.map(scale, precision.inexact(updates))

    return optax.stateless(update_fn)


def _iteration(
    polynomials: Method | Iteration, dtype: str, form: Form
) -> Callable[..., Array]:
    """Returns the function that makes matrices semi-orthogonal."""
    if isinstance(polynomials, Fractions):
        if (dtype, form) != ("float32", "auto"):
            raise ValueError(
                "`dtype` of `orthogonalize` must be float32 for fractions, and `form` "
                f"is for polynomials, got {dtype!r} and {form!r}. Leave them out."
            )
        return functools.partial(zolotarev, fractions=polynomials)
    if isinstance(polynomials, Polynomials):
        if dtype == "auto" and form == "gram":
            dtype = "float32"
        if dtype != "auto":
            resolve_form((1, 1), dtype, form)
        # Resolved at an update and not before: that starts the backend, which must not
        # be running yet when `jax.distributed.initialize` is called.
        return lambda x, **kwargs: newton_schulz(
            x, polynomials, dtype=resolve_dtype(dtype), form=form, **kwargs
        )
    if (dtype, form) != ("auto", "auto"):
        raise ValueError(
            "`dtype` and `form` of `orthogonalize` are for polynomials, got them for "
            f"the function {polynomials}. Let the function choose its own."
        )
    return functools.partial(_checked, polynomials)


def _checked(iteration: Iteration, x: Array) -> Array:
    """Returns `iteration(x)`, if it has shape and type of `x`."""
    y = iteration(x)
    if (y.shape, y.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"the function given to `orthogonalize` must return {x.dtype} of shape "
            f"{x.shape}, as it is given, got {y.dtype} of shape {y.shape}."
        )
    return y
