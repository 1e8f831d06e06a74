"""Models of gemma and kauldron, both linen with einsums of their own."""

import flax.linen as nn
import jax.numpy as jnp

from builders import tree
from builders.tree import Builders, Tree


def _gemma(kv_heads: int, transposed: bool):
    from gemma.gm.nn import _config, _modules, _transformer

    config = _config.TransformerConfig(
        num_embed=64, embed_dim=32, hidden_dim=48, num_heads=4, head_dim=8,
        num_kv_heads=kv_heads, final_logit_softcap=None, use_post_attn_norm=True,
        use_post_ffw_norm=True, use_qk_norm=True, transpose_gating_einsum=transposed,
        attention_types=(_modules.AttentionType.GLOBAL,) * 2,
    )  # fmt: skip
    return _transformer.Transformer(config=config, dtype=jnp.float32, tokens="tokens")


def _gemma_tree(kv_heads: int = 2, transposed: bool = True) -> Tree:
    return tree.linen(_gemma(kv_heads, transposed), jnp.zeros((1, 8), jnp.int32))


def _gemma_lora() -> Tree:
    from gemma.gm.nn import _lora

    model = _lora.LoRA(rank=3, model=_gemma(2, True), dtype=jnp.float32)
    return tree.linen(model, jnp.zeros((1, 8), jnp.int32))


def _kauldron() -> Tree:
    from kauldron.modules import transformers, vit

    encoder = vit.VitEncoder.from_spec(
        num_heads=4, hidden_size=16, num_layers=2, patch_size=8, mlp_size=48,
        block_type=transformers.PreNormBlock, prepend_cls_token=True,
        encoder_norm=nn.RMSNorm(), image="image",
    )  # fmt: skip
    model = vit.Vit(encoder=encoder, num_classes=10, mode="cls_token", image="image")
    return tree.linen(model, jnp.zeros((1, 16, 16, 3)))


BUILDERS: Builders = {
    "gemma transposed gating": _gemma_tree,
    "gemma plain gating": lambda: _gemma_tree(transposed=False),
    "gemma all heads": lambda: _gemma_tree(kv_heads=4),
    "gemma LoRA": _gemma_lora,
    "kauldron vision": _kauldron,
}
