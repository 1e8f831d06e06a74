"""Settings of the model."""

import dataclasses
from typing import Literal

from nanochat_jax.config import schema
from nanochat_jax.config.base import Settings


@dataclasses.dataclass(frozen=True)
class ModelConfig(Settings):
    """Shape and arithmetic of the GPT.

    Attributes:
      dim: Width of the residual stream, D.
      n_layers: Blocks, L.
      n_heads: Query heads, N; `dim / n_heads` is the even size of a head, H.
      n_kv_heads: Key and value heads, K; divides `n_heads`. `n_heads` if not given.
      ffn_mult: Hidden width of the feed-forward layer over `dim`.
      vocab_size: Tokens, V.
      pad_vocab_to: Rows of the embedding and columns of the head are filled up to a
        multiple of this, so that devices divide them: 128 serves any power of two up
        to that. What is filled up has no part in losses, samples and exports.
      max_seq_len: Longest sequence, in tokens.
      weight_tied: Whether the head is the transposed embedding.
      rope_theta: Base of the rotary frequencies.
      compute_dtype: Type of activations and products; parameters are float32.
      remat: Whether blocks are recomputed in the backward pass. Before JAX 0.11 it
        takes `scan_layers` too for this to save memory on CPUs.
      scan_layers: Whether the parameters of all blocks are stacked and run by one loop,
        which compiles faster the more blocks there are.
      loss_chunk: Tokens whose logits stand at a time, at least one position of every
        sequence; 0 for all. Fewer take less memory, but a large vocabulary and a fast
        device want more.
      ternary: Whether the kernels of blocks are rounded to -1, 0 and 1 times a scale,
        and what they multiply to 8 bits, as in BitNet b1.58; trained are float weights.
      group_size: Entries of a column of such a kernel that share a scale.
    """

    dim: int = 256
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None
    ffn_mult: float = 2.6875
    vocab_size: int = 256
    pad_vocab_to: int = 1
    max_seq_len: int = 512
    weight_tied: bool = True
    rope_theta: float = 10_000.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    scan_layers: bool = False
    loss_chunk: int = 512
    ternary: bool = False
    group_size: int = 128

    def _checks(self) -> list[schema.Check]:
        sizes = (
            "dim", "n_layers", "n_heads", "vocab_size", "pad_vocab_to", "max_seq_len",
            "group_size",
        )  # fmt: skip
        heads = max(self.n_heads, 1)
        return [
            *schema.lower_bounds(self, dict.fromkeys(sizes, 1) | {"loss_chunk": 0}),
            (
                self.dim % heads == 0 and self.dim // heads % 2 == 0,
                "`dim` must be an even multiple of `n_heads`, got "
                f"{self.dim} and {self.n_heads}.",
            ),
            (
                self.kv_heads >= 1 and self.n_heads % self.kv_heads == 0,
                "`n_heads` must be a multiple of `n_kv_heads`, got "
                f"{self.n_heads} and {self.kv_heads}.",
            ),
            (
                self.ffn_dim >= 1 or self.dim < 1,
                f"`ffn_mult` must give a hidden width, `dim` x `ffn_mult`, of at "
                f"least 1, got {self.ffn_mult}.",
            ),
            (
                self.rope_theta > 0,
                f"`rope_theta` must be positive, got {self.rope_theta}.",
            ),
        ]

    @property
    def table_size(self) -> int:
        """Rows of the embedding and columns of the head: V, filled up."""
        return -(-self.vocab_size // self.pad_vocab_to) * self.pad_vocab_to

    @property
    def head_dim(self) -> int:
        """Size of a head, H."""
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads, K."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the feed-forward layer, F."""
        return round(self.dim * self.ffn_mult)
