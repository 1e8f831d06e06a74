"""Models whose trees keep module classes (Equinox, Haliax), and RWKV's bare arrays."""

import equinox as eqx
import jax
import jax.numpy as jnp

from builders.tree import Builders, Tree


class Block(eqx.Module):
    norm: eqx.nn.LayerNorm
    att: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    rms: eqx.nn.RMSNorm

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.norm = eqx.nn.LayerNorm(24)
        self.att = eqx.nn.MultiheadAttention(4, 24, use_query_bias=True, key=keys[0])
        self.up = eqx.nn.Linear(24, 64, key=keys[1])
        self.down = eqx.nn.Linear(64, 24, key=keys[2])
        self.rms = eqx.nn.RMSNorm(24)


class Layers(eqx.Module):
    emb: eqx.nn.Embedding
    wte: eqx.nn.Embedding
    conv: eqx.nn.Conv2d
    dw: eqx.nn.Conv2d
    ct: eqx.nn.ConvTranspose2d
    lstm: eqx.nn.LSTMCell
    gru: eqx.nn.GRUCell
    blocks: list[Block]
    stacked: Block
    cls_token: jax.Array
    pos_embed: jax.Array
    lm_head: eqx.nn.Linear
    classifier: eqx.nn.Linear
    out: eqx.nn.Linear
    mlp: eqx.nn.MLP
    prelu: eqx.nn.PReLU
    gn: eqx.nn.GroupNorm
    bn: eqx.nn.BatchNorm
    sn: eqx.nn.SpectralNorm
    wn: eqx.nn.WeightNorm
    scalar: eqx.nn.Linear
    pscalar: eqx.nn.Linear

    def __init__(self, key):
        keys = iter(jax.random.split(key, 24))
        nn, linear = eqx.nn, lambda *sizes: eqx.nn.Linear(*sizes, key=next(keys))
        self.emb = nn.Embedding(50, 24, key=next(keys))
        self.wte = nn.Embedding(50, 24, key=next(keys))
        self.conv = nn.Conv2d(3, 8, 3, key=next(keys))
        self.dw = nn.Conv2d(8, 8, 3, groups=8, key=next(keys))
        self.ct = nn.ConvTranspose2d(8, 4, 3, key=next(keys))
        self.lstm = nn.LSTMCell(24, 16, key=next(keys))
        self.gru = nn.GRUCell(24, 16, key=next(keys))
        self.blocks = [Block(next(keys)) for _ in range(2)]
        self.stacked = eqx.filter_vmap(Block)(jax.random.split(next(keys), 3))
        self.cls_token, self.pos_embed = jnp.zeros((1, 24)), jnp.zeros((17, 24))
        self.lm_head, self.classifier, self.out = (linear(24, n) for n in (50, 10, 50))
        self.mlp = nn.MLP(8, 8, 32, 2, key=next(keys))
        self.prelu = nn.PReLU()
        self.gn = nn.GroupNorm(4, 8)
        self.bn = nn.BatchNorm(8, "batch", mode="ema")
        self.sn = nn.SpectralNorm(linear(8, 8), "weight", key=next(keys))
        self.wn = nn.WeightNorm(linear(8, 12))
        self.scalar, self.pscalar = linear("scalar", 16), linear(16, "scalar")


class Named(eqx.Module):
    """Some of Haliax's layers, and three stacked blocks."""

    wte: eqx.Module
    token_embeddings: eqx.Module
    blocks: eqx.Module
    lm_head: eqx.Module
    conv: eqx.Module
    out: eqx.Module


class NamedBlock(eqx.Module):
    norm: eqx.Module
    c_attn: eqx.Module
    c_proj: eqx.Module
    up: eqx.Module
    down: eqx.Module

    @staticmethod
    def init(embed, hidden, qkv, heads, head_dim, *, key):
        import haliax.nn as hnn

        keys = jax.random.split(key, 4)
        return NamedBlock(
            hnn.LayerNorm.init(embed),
            hnn.Linear.init(embed, (qkv, heads, head_dim), key=keys[0]),
            hnn.Linear.init((heads, head_dim), embed, key=keys[1]),
            hnn.Linear.init(embed, hidden, key=keys[2]),
            hnn.Linear.init(hidden, embed, key=keys[3]),
        )


def _of_module(build) -> Tree:
    model = eqx.filter_eval_shape(build, jax.random.key(0))
    inexact = lambda x: hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)
    return Tree(eqx.filter(model, inexact), model, keeps_classes=True)


def _one_leaf() -> Tree:
    """Returns a model of which one leaf is trained."""
    whole = _of_module(Layers)
    where = lambda model: model.out.weight
    frozen = jax.tree.map(lambda _: None, whole.params)
    params = eqx.tree_at(
        where, frozen, where(whole.params), is_leaf=lambda x: x is None
    )
    return Tree(params, whole.model, keeps_classes=True)


def _haliax(key):
    import haliax as hax
    import haliax.nn as hnn
    from haliax.nn import Stacked

    Axis = hax.Axis
    vocab, embed, hidden = Axis("vocab", 64), Axis("embed", 16), Axis("hidden", 48)
    attention = Axis("qkv", 3), Axis("heads", 4), Axis("head_dim", 4)
    keys = jax.random.split(key, 6)
    stack = Stacked.init(Axis("layers", 3), NamedBlock)
    return Named(
        hnn.Embedding.init(vocab, embed, key=keys[0]),
        hax.random.normal(keys[1], (vocab, embed)),
        stack(embed, hidden, *attention, key=jax.random.split(keys[2], 3)),
        hnn.Linear.init(embed, vocab, key=keys[3]),
        hnn.Conv.init(
            Axis("width", 9), Axis("channels", 3), Axis("out", 8), 3, key=keys[4]
        ),
        hnn.Linear.init(embed, hidden, out_first=False, key=keys[5]),
    )


def _equimo(key):
    from equimo.models import VisionTransformer

    return VisionTransformer(
        img_size=16, in_channels=3, dim=16, patch_size=4, num_heads=4, depths=[2],
        reg_tokens=2, num_classes=10, init_values=1e-5, key=key,
    )  # fmt: skip


def _e1jax(key):
    from e1jax import E1

    return E1(dim=16, num_heads=4, ff_dim=48, num_layers=2, key=key)


def _rwkv() -> Tree:
    from jaxrwkv.rwkv7 import ScanRWKV

    make = lambda key: ScanRWKV.randomize_weights(key, 2, 128, 64, {}, jnp.float32)[0]
    return Tree(jax.eval_shape(make, jax.random.key(0)))


BUILDERS: Builders = {
    "equinox layers": lambda: _of_module(Layers),
    "equinox one leaf": _one_leaf,
    "haliax stacked": lambda: _of_module(_haliax),
    "equimo vision": lambda: _of_module(_equimo),
    "e1jax": lambda: _of_module(_e1jax),
    "jaxrwkv rwkv7": _rwkv,
}
