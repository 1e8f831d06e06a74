"""Models of tunix, with einsums of its own, and qwix's LoRA on one of them."""

import importlib

import jax.numpy as jnp
from flax import nnx

from builders import tree
from builders.tree import Builders, Tree

SIZES = {
    "num_layers": 2,
    "embed_dim": 32,
    "hidden_dim": 48,
    "num_heads": 4,
    "head_dim": 8,
    "num_kv_heads": 2,
}


def _build(module: str, name: str, **options):
    """Returns a function that builds a model of tunix."""
    models = importlib.import_module(f"tunix.models.{module}.model")
    config = models.ModelConfig(**{**SIZES, **options})
    return lambda: getattr(models, name)(config, rngs=nnx.Rngs(0))


def _llama(module: str, name: str, **options):
    sizes = {"vocab_size": 64, "rope_theta": 10_000, "norm_eps": 1e-6}
    return _build(module, name, **sizes, **options)


def _gemma1(**options):
    from tunix.models.gemma.model import AttentionType

    kinds = (AttentionType.GLOBAL,) * 2
    sizes = {"num_embed": 64, "final_logit_softcap": None, "attention_types": kinds}
    return _build("gemma", "Gemma", **sizes, **options)


def _gemma4(**options):
    from tunix.models.gemma4.model import AttentionType

    kinds = AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL
    sizes = {"num_embed": 64, "sliding_window_size": 8, "attention_pattern": kinds}
    small = {"per_layer_input_dim": 6, "global_key_size": 16, "num_global_kv_heads": 1}
    return _build("gemma4", "Gemma4", **sizes, **small, **options)


def _lora() -> Tree:
    """Returns Qwen3 with adapters by qwix, of which the adapters are trained."""
    import qwix

    build = _llama("qwen3", "Qwen3", use_tied_embedding=True)
    rule = qwix.LoraProvider(module_path=".*(attn|mlp).*", rank=4, alpha=2.0)
    tokens = jnp.zeros((1, 8), int)
    mask = jnp.ones((1, 8, 8), bool)

    def adapted():
        return qwix.apply_lora_to_model(build(), rule, tokens, tokens, None, mask)

    return tree.nnx(adapted, nnx.LoRAParam)


BUILDERS: Builders = {
    "tunix qwen3": lambda: tree.nnx(_llama("qwen3", "Qwen3")),
    "tunix qwen3 tied": lambda: tree.nnx(
        _llama("qwen3", "Qwen3", use_tied_embedding=True)
    ),
    "tunix qwen3 experts": lambda: tree.nnx(
        _llama("qwen3", "Qwen3", num_experts=4, num_experts_per_tok=2)
    ),
    "tunix llama3": lambda: tree.nnx(_llama("llama3", "Llama3")),
    "tunix qwen2": lambda: tree.nnx(_llama("qwen2", "Qwen2")),
    "tunix gemma3": lambda: tree.nnx(
        _build("gemma3", "Gemma3", num_embed=64, sliding_window_size=8)
    ),
    "tunix gemma4": lambda: tree.nnx(_gemma4()),
    "tunix gemma4 experts": lambda: tree.nnx(
        _gemma4(
            enable_moe=True,
            num_experts=4,
            num_experts_per_tok=2,
            expert_dim=24,
            moe_dense_hidden_dim=40,
        )
    ),
    "tunix gemma1": lambda: tree.nnx(
        _gemma1(use_post_attn_norm=False, use_post_ffw_norm=False)
    ),
    "tunix gemma1 all heads": lambda: tree.nnx(
        _gemma1(num_kv_heads=4, use_post_attn_norm=True, use_post_ffw_norm=True)
    ),
    "qwix LoRA": _lora,
}
