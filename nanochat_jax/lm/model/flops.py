"""Floating-point operations of the model, counted from its shape."""

from nanochat_jax.config import ModelConfig


def count_flops_per_token(config: ModelConfig, seq_len: int | None = None) -> int:
    """Returns the floating-point operations of training on one token.

    `6 * M + 12 * L * N * H * S`: two operations a multiply-add, once forward and twice
    backward, for the M entries of the kernels and head, and for query-key and
    weight-value products of N heads of size H over S positions. By convention the
    masked half of attention counts; look-ups, norms, the optimizer and recomputation
    do not.

    Args:
      config: Shape of the model.
      seq_len: Tokens in a sequence, S; `config.max_seq_len` if not given.
    """
    seq_len = config.max_seq_len if seq_len is None else seq_len
    query_dim = config.n_heads * config.head_size
    key_dim = config.kv_heads * config.head_size
    block = config.dim * (2 * query_dim + 2 * key_dim + 3 * config.ffn_dim)
    kernels = config.n_layers * block + config.dim * config.table_size
    return 6 * kernels + 12 * config.n_layers * query_dim * seq_len
