"""Which parameters links for bfloat16 weights take, and which they refuse."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from nanochat_jax.transforms import checks


def is_short(x: Any) -> bool:
    """Returns whether a leaf is bfloat16."""
    return x.dtype == jnp.bfloat16


def require_params(params: optax.Params | None, who: str) -> optax.Params:
    """Returns the parameters of an update, if it has what a precision link needs.

    Args:
      params: Parameters that an `init` or an `update` was given.
      who: The link.

    Raises:
      ValueError: If there are none.
      TypeError: If a leaf is a float of fewer than 32 bits but not bfloat16; with all
        that are.
    """
    known = checks.require_params(params, who)
    found = [
        f"  {keystr(path)} is {x.dtype}"
        for path, x in jax.tree.leaves_with_path(known)
        if jnp.issubdtype(x.dtype, jnp.floating)
        and x.dtype.itemsize < 4
        and not is_short(x)
    ]
    if found:
        raise TypeError(
            f"`{who}` is for weights in bfloat16, which have the exponents of float32, "
            "but\n"
            + "\n".join(found)
            + "\nCast these leaves to bfloat16 or float32, or leave them out with "
            f"`optax.masked({who}(...), mask)`."
        )
    return known
