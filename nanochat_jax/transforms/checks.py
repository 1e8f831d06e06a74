"""What transforms refuse, in words."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr


def require_real(tree: Any, who: str) -> None:
    """Refuses complex leaves.

    Args:
      tree: Parameters or gradients.
      who: Transform that has no rule for them.

    Raises:
      TypeError: If a leaf is complex; with all that are.
    """
    found = [
        f"  {keystr(path)} is {x.dtype}"
        for path, x in jax.tree.leaves_with_path(tree)
        if jnp.issubdtype(x.dtype, jnp.complexfloating)
    ]
    if found:
        raise TypeError(
            f"`{who}` needs real leaves, but\n"
            + "\n".join(found)
            + "\nWrap the optimizer in `optax.contrib.split_real_and_imaginary`."
        )


def require_matrices(tree: Any, who: str) -> None:
    """Refuses complex leaves, and leaves of fewer than two axes.

    Args:
      tree: Parameters or updates.
      who: Transform of matrices.

    Raises:
      TypeError: If a leaf is complex; with all that are.
      ValueError: If a leaf has fewer than two axes; with all that have.
    """
    require_real(tree, who)
    found = [
        f"  {keystr(path)} has shape {x.shape}"
        for path, x in jax.tree.leaves_with_path(tree)
        if x.ndim < 2
    ]
    if found:
        raise ValueError(
            f"`{who}` needs leaves of two or more axes, but\n"
            + "\n".join(found)
            + "\nSend them to another transform with `optax.partition`."
        )


def require_params(params: Any, who: str) -> Any:
    """Returns the parameters of an update, which must be given.

    Args:
      params: Parameters that an `update` was given.
      who: Transform that needs them.

    Raises:
      ValueError: If there are none.
    """
    if params is None:
        raise ValueError(
            f"`{who}` requires the current value of parameters, but `params` was not "
            "given to `update`: call `tx.update(grads, state, params)`."
        )
    return params


def require_codecs(codecs: Any) -> None:
    """Refuses anything but a mapping from names of fields to codecs.

    Args:
      codecs: Argument of `quantize_state`.

    Raises:
      TypeError: If it is none, or an entry is no codec; with all that are not.
    """
    if not isinstance(codecs, Mapping):
        raise TypeError(
            "`codecs` must be a mapping from names of fields of the state to codecs, "
            f'such as {{"momentum": Int8()}}, got {codecs!r}.'
        )
    wrong = [
        f"  {name}: {codec!r}"
        for name, codec in codecs.items()
        if isinstance(codec, type) or not hasattr(codec, "needs_key")
    ]
    if wrong:
        raise TypeError(
            "`codecs` needs a codec for each field, such as `Int8()`, got\n"
            + "\n".join(wrong)
        )


def require_rule(basis: Any, complement: Any, project: Any) -> None:
    """Refuses arguments of `galore` of the wrong kind.

    Args:
      basis: Its rule for bases.
      complement: Its complement.
      project: Its rule for which matrices are projected.

    Raises:
      TypeError: If one is of the wrong kind; with all that are.
    """
    is_rule = hasattr(basis, "is_due") and hasattr(basis, "find")
    is_transform = isinstance(complement, optax.GradientTransformation)
    is_number = isinstance(complement, int | float) or (
        isinstance(complement, jax.Array | np.ndarray | np.generic)
        and complement.ndim == 0
    )
    wrong = [
        f"  `{name}` must be {kind}, got {value!r}"
        for name, value, holds, kind in (
            (
                "basis", basis, is_rule and not isinstance(basis, type),
                "a rule with `is_due` and `find`, such as `RandomizedSVD()`",
            ),
            (
                "complement", complement, is_transform or is_number,
                "a number or a transformation, such as `momentum(0.8)`",
            ),
            ("project", project, callable(project), "a function of shape and rank"),
        )
        if not holds
    ]  # fmt: skip
    if wrong:
        raise TypeError("`galore` got\n" + "\n".join(wrong))


def require_state(state: Any, kinds: type | tuple[type, ...], who: str) -> None:
    """Refuses a state of another kind, such as plain dicts and lists.

    Args:
      state: What was given as a state.
      kinds: What it may be.
      who: Transform that it was given to.

    Raises:
      TypeError: If it is of none of these kinds.
    """
    if not isinstance(state, kinds):
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        names = " or ".join(f"`{kind.__name__}`" for kind in kinds)
        raise TypeError(
            f"`{who}` needs a {names} for a state, got a {type(state).__name__}. A "
            "state belongs to the optimizer that made it, with the same bits and rank. "
            "What is restored without a target comes as plain dicts and lists: restore "
            "it into a state of this optimizer, as Orbax does by "
            "`StandardCheckpointer().restore(path, jax.eval_shape(tx.init, params))`."
        )


def update_without_params(
    tx: optax.GradientTransformationExtraArgs,
    updates: optax.Updates,
    state: optax.OptState,
    name: str,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, optax.OptState]:
    """Runs a transform inside `galore`, which has no parameters for it.

    Args:
      tx: The transform.
      updates: Its updates.
      state: Its state.
      name: Argument of `galore` that it is.
      extra_args: What it is given besides.

    Raises:
      ValueError: If it asks for parameters.
    """
    try:
        return tx.update(updates, state, None, **extra_args)
    except ValueError as error:
        if "`params`" not in str(error):
            raise
        raise ValueError(
            f"`{name}` of `galore` needs parameters, but works on projected gradients, "
            "which have other shapes. Put weight decay and trust ratios outside, as in "
            "`optax.chain(galore(optax.scale_by_adam(), rank), "
            "optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(rate))` for "
            "`galore(optax.adamw(rate), rank)`."
        ) from error
