"""Settings of the model."""

import dataclasses
import functools
from typing import Literal

from nanochat_jax.config import schema
from nanochat_jax.config.base import Settings
from nanochat_jax.config.schema import setting

_model = functools.partial(setting, group="Model")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Settings):
    """Shape and arithmetic of the GPT.

    Attributes:
      dim: Width of the residual stream, D.
      n_layers: Blocks, L.
      n_heads: Query heads, N.
      n_kv_heads: Key and value heads, K; divides `n_heads`. `n_heads` if not given.
      head_dim: Even size of a head, H; `dim / n_heads` if not given.
      qk_norm: Whether queries and keys are normalised: "unit" without a gain, as the
        models that are trained here; "gain" with one, as Qwen3; "none", as Llama.
      ffn_mult: Hidden width of the feed-forward layer over `dim`.
      vocab_size: Tokens, V.
      pad_vocab_to: Pads the embedding and the head to a multiple of this, so that they
        can be sharded; 128 suits any power of two up to 128 devices. Padding has no
        part in losses, samples and exports.
      max_seq_len: Longest sequence, in tokens.
      weight_tied: Whether the head is the transposed embedding.
      norm_eps: Added to the mean square in norms.
      rope_theta: Base of the rotary frequencies.
      rope_scaling: Llama 3's scaling of the rotary frequencies to longer sequences:
        `factor`, `low_freq_factor`, `high_freq_factor` and the sequence length before;
        empty for none.
      compute_dtype: Type of activations and products.
      param_dtype: Type of the parameters; updates of bfloat16 ones land as
        `weight_rounding` says.
      remat: Whether blocks are recomputed in the backward pass. Before JAX 0.11 this
        saves memory on CPUs only together with `scan_layers`.
      scan_layers: Whether the parameters of all blocks are stacked and run by one loop,
        which compiles faster the more blocks there are.
      loss_chunk: Tokens whose logits are computed at a time, at least one position of
        every sequence; 0 for all. Fewer take less memory; a large vocabulary on a fast
        device runs faster with more.
      ternary: Whether kernels of blocks are rounded to -1, 0 and 1 times a scale, and
        their inputs to 8 bits, as in BitNet b1.58; the trained weights are floats.
      group_size: Entries of a column of a ternary kernel that share a scale.
    """

    dim: int = _model(256, least=1)
    n_layers: int = _model(4, least=1)
    n_heads: int = _model(4, least=1)
    n_kv_heads: int | None = _model(None)
    head_dim: int | None = _model(None)
    qk_norm: Literal["unit", "gain", "none"] = _model("unit")
    ffn_mult: float = _model(2.6875)
    vocab_size: int = _model(256, least=1)
    pad_vocab_to: int = _model(1, least=1)
    max_seq_len: int = _model(512, least=1)
    weight_tied: bool = _model(True)
    norm_eps: float = _model(1e-6)
    rope_theta: float = _model(10_000.0)
    rope_scaling: tuple[float, ...] = _model(())
    compute_dtype: Literal["float32", "bfloat16"] = _model("float32")
    param_dtype: Literal["float32", "bfloat16"] = _model("float32")
    remat: bool = _model(False)
    scan_layers: bool = _model(False)
    loss_chunk: int = _model(512, least=0)
    ternary: bool = _model(False)
    group_size: int = _model(128, least=1)

    def _checks(self) -> list[schema.Check]:
        heads, given = max(self.n_heads, 1), self.head_dim
        return [
            (
                given is not None
                or (self.dim % heads == 0 and self.dim // heads % 2 == 0),
                "`dim` must be an even multiple of `n_heads`, got "
                f"{self.dim} and {self.n_heads}.",
            ),
            (
                given is None or (given >= 2 and given % 2 == 0),
                f"`head_dim` must be even and at least 2, got {given}.",
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
            (
                self.norm_eps > 0,
                f"`norm_eps` must be positive, got {self.norm_eps}.",
            ),
            (
                _is_scaling(self.rope_scaling),
                "`rope_scaling` must be empty, or four numbers: a factor of at least "
                "1, 0 < `low_freq_factor` < `high_freq_factor`, and a positive "
                f"sequence length, got {[*self.rope_scaling]}.",
            ),
        ]

    @property
    def table_size(self) -> int:
        """Rows of the embedding and columns of the head: V, padded."""
        return -(-self.vocab_size // self.pad_vocab_to) * self.pad_vocab_to

    @property
    def head_size(self) -> int:
        """Size of a head, H."""
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Key and value heads, K."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the feed-forward layer, F."""
        return round(self.dim * self.ffn_mult)


def _is_scaling(values: tuple[float, ...]) -> bool:
    if len(values) != 4:
        return not values
    factor, low, high, length = values
    return factor >= 1 and 0 < low < high and length > 0
