"""Models written with Flax: NNX (attnax, dantinox, mamba2-jax) and linen (the rest)."""

import jax.numpy as jnp
from flax import nnx

from builders import tree
from builders.tree import Builders, Tree

TOKENS = jnp.zeros((1, 8), int)


def _attnax_decoder() -> Tree:
    from attnax import TransformerConfig, TransformerDecoder

    config = TransformerConfig(
        vocab_size=64, d_model=16, num_heads=4, num_layers=2, d_ff=48, max_len=8
    )
    return tree.nnx(lambda: TransformerDecoder(nnx.Rngs(0), config))


def _attnax_vision() -> Tree:
    from attnax import VisionTransformer, VisionTransformerConfig

    config = VisionTransformerConfig(
        image_size=16, patch_size=4, num_classes=10, d_model=16, num_heads=4,
        num_layers=2, d_ff=48,
    )  # fmt: skip
    return tree.nnx(lambda: VisionTransformer(nnx.Rngs(0), config))


def _attnax_experts() -> Tree:
    from attnax import MixtureOfExperts

    return tree.nnx(
        lambda: MixtureOfExperts(nnx.Rngs(0), d_model=16, d_ff=48, num_experts=4)
    )


def _dantinox(**options) -> Tree:
    from dantinox.core.config import ModelConfig
    from dantinox.core.model import Transformer

    config = ModelConfig(
        dim=16, n_heads=4, num_blocks=2, vocab_size=64, max_context=8, **options
    )
    return tree.nnx(lambda: Transformer(config, rngs=nnx.Rngs(0)))


def _mamba2() -> Tree:
    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=64, hidden_size=32, state_size=8, head_dim=8, num_hidden_layers=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return tree.nnx(lambda: Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)))


def _nano_moe() -> Tree:
    from nano_moe import NanoMoE, NanoMoEConfig

    config = NanoMoEConfig(
        vocab_size=64, n_layers=2, n_heads=4, d_model=16, d_ff=48, n_experts=3,
        block_size=8,
    )  # fmt: skip
    return tree.linen(NanoMoE(config), TOKENS)


def _nanodl_vision() -> Tree:
    from nanodl import ViT

    model = ViT(
        patch_size=(4, 4), num_layers=2, hidden_dim=16, num_heads=4,
        feedforward_dim=16, n_outputs=10, dropout=0.0,
    )  # fmt: skip
    return tree.linen(model, jnp.zeros((1, 16, 16, 3)))


def _nanodl_llama() -> Tree:
    from nanodl import Llama3

    model = Llama3(
        num_layers=2, num_heads=4, num_groups=2, hidden_dim=16, feedforward_dim=16,
        dropout=0.0, vocab_size=64, embed_dim=16, max_length=8, start_token=0,
        end_token=1,
    )  # fmt: skip
    return tree.linen(model, TOKENS)


BUILDERS: Builders = {
    "attnax decoder": _attnax_decoder,
    "attnax vision": _attnax_vision,
    "attnax experts": _attnax_experts,
    "dantinox gqa": lambda: _dantinox(attention="gqa", kv_heads=2),
    "dantinox mla": lambda: _dantinox(
        attention="mla", down_dim_q=8, down_dim_kv=8, rope_dim=4
    ),
    "dantinox moe": lambda: _dantinox(ffn="moe"),
    "dantinox differential": lambda: _dantinox(
        differential=True, pos_encoding="learned", weight_tying=False
    ),
    "mamba2-jax": _mamba2,
    "nano-moe-jax": _nano_moe,
    "nanodl vision": _nanodl_vision,
    "nanodl llama": _nanodl_llama,
}
