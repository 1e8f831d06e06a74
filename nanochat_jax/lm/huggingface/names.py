"""Names of the tensors of a model, and the parameters that they are.

Kernels are `[in, out]` here and `[out, in]` there. Blocks may be stacked here, and the
vocabulary padded; there they are not.
"""

import dataclasses

from jax.tree_util import KeyPath, keystr, tree_leaves_with_path

from nanochat_jax.config import ModelConfig
from nanochat_jax.lm.model import gpt

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Tensors of the vocabulary; the second is the first if they are tied."""

HEAD_NORMS = ("attention/query_norm/scale", "attention/key_norm/scale")
"""Gains of the norms of queries and keys, as paths within a block."""

_OUTER = {
    "embed/embedding": EMBEDDING,
    "final_norm/scale": "model.norm.weight",
    "head/kernel": HEAD,
}
_IN_BLOCK = {
    "attention_norm/scale": "input_layernorm",
    "attention/query/kernel": "self_attn.q_proj",
    "attention/key/kernel": "self_attn.k_proj",
    "attention/value/kernel": "self_attn.v_proj",
    "attention/out/kernel": "self_attn.o_proj",
    HEAD_NORMS[0]: "self_attn.q_norm",
    HEAD_NORMS[1]: "self_attn.k_norm",
    "ffn_norm/scale": "post_attention_layernorm",
    "ffn/gate/kernel": "mlp.gate_proj",
    "ffn/up/kernel": "mlp.up_proj",
    "ffn/down/kernel": "mlp.down_proj",
}


@dataclasses.dataclass(frozen=True)
class Place:
    """A parameter, and the tensors that it is made of.

    Attributes:
      path: Path of the parameter.
      shape: Its shape.
      tensors: Names of the tensors: one, or one for each block if these are stacked.
      tensor_shape: Shape of each tensor.
    """

    path: KeyPath
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    tensor_shape: tuple[int, ...]

    @property
    def is_kernel(self) -> bool:
        """Whether a tensor is the transposed parameter."""
        return keystr(self.path, simple=True, separator="/").endswith("/kernel")

    @property
    def is_stacked(self) -> bool:
        """Whether the parameter has one row for each tensor."""
        return len(self.shape) > len(self.tensor_shape)


def places(config: ModelConfig) -> list[Place]:
    """Returns the parameters of a model in their order, with their tensors.

    Args:
      config: Shape of the model.
    """
    leaves = tree_leaves_with_path(gpt.abstract_model(config)[1])
    return [_place(config, path, x.shape) for path, x in leaves]


def in_block(layer: int, path: str) -> str:
    """Returns the name of a tensor of a block.

    Args:
      layer: Number of the block.
      path: Path of the parameter within it.
    """
    return f"model.layers.{layer}.{_IN_BLOCK[path]}.weight"


def _place(config: ModelConfig, path: KeyPath, shape: tuple[int, ...]) -> Place:
    name = keystr(path, simple=True, separator="/")
    if name in _OUTER:
        unpadded = shape if len(shape) == 1 else (config.vocab_size, config.dim)
        return Place(path, shape, (_OUTER[name],), unpadded)
    rest = name.removeprefix("blocks/")
    if config.scan_layers:
        tensors = tuple(in_block(i, rest) for i in range(config.n_layers))
        return Place(path, shape, tensors, _as_stored(rest, shape[1:]))
    layer, rest = rest.split("/", 1)
    return Place(path, shape, (in_block(int(layer), rest),), _as_stored(rest, shape))


def _as_stored(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if path.endswith("/kernel") else shape
