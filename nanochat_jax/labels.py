"""What part a parameter plays, by its path: which decides how it is optimised.

The number of axes is not enough: stacked biases have two axes and are vectors, and an
embedding is a matrix in shape only.
"""

from typing import Literal

import jax
import optax
from jax.tree_util import KeyPath, keystr

Label = Literal["matrix", "embedding", "head", "vector"]

# Any word of a name makes an embedding, as in `tok_embeddings`; but `multi_head` is no
# head, so those names are whole.
_EMBEDDINGS = {"embed", "embedding", "embeddings", "wte", "wpe"}
_HEADS = ("head", "lm_head", "unembed", "unembedding", "output_head")
_VECTORS = ("b", "bias", "scale", "gain", "gamma", "beta")


def label_params(params: optax.Params) -> optax.Params:
    """Labels every parameter `"matrix"`, `"embedding"`, `"head"` or `"vector"`.

    Biases, norm gains and whatever has fewer than two axes are vectors; embeddings and
    heads go by the names on their path; the other leaves are matrices, the last two
    axes of which are orthogonalised by Muon.

    Example:
      >>> kernel = jnp.zeros((8, 8))
      >>> label_params({"embed": {"embedding": kernel}, "out": {"kernel": kernel}})
      {'embed': {'embedding': 'embedding'}, 'out': {'kernel': 'matrix'}}

    Args:
      params: Parameters, as arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      A tree like `params`, of labels.
    """
    return jax.tree.map_with_path(_label, params)


def _label(path: KeyPath, x: jax.Array) -> Label:
    names = keystr(path, simple=True, separator="/").lower().split("/")
    # Flax states end in the attribute that holds the array.
    names = [name for name in names if name not in ("value", "raw_value")]
    if len(x.shape) < 2 or (names and names[-1] in _VECTORS):
        return "vector"
    if any(name in _HEADS for name in names):
        return "head"
    if not _EMBEDDINGS.isdisjoint("_".join(names).split("_")):
        return "embedding"
    return "matrix"
