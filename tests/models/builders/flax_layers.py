"""Every layer of Flax, NNX and linen, alone, stacked and scanned."""

import jax.numpy as jnp
from flax import linen as nn, nnx
from flax.linen import initializers

from builders import tree
from builders.tree import Builders, Tree


class NnxLayers(nnx.Module):
    def __init__(self, rngs):
        param = lambda *shape: nnx.Param(jnp.zeros(shape))
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.gn = nnx.GroupNorm(8, num_groups=4, rngs=rngs)
        self.prelu = nnx.PReLU()
        self.cls_token = param(1, 1, 24)
        self.position_embeddings = param(1, 17, 24)
        self.embedder = nnx.Embed(50, 24, rngs=rngs)
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.convt = nnx.ConvTranspose(8, 4, (3, 3), rngs=rngs)
        self.dw = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.einsum = nnx.Einsum("btd,dhk->bthk", (24, 4, 8), rngs=rngs)
        self.lg = nnx.LinearGeneral(24, (4, 8), rngs=rngs)
        self.lg2 = nnx.LinearGeneral((4, 8), 24, axis=(-2, -1), rngs=rngs)
        self.mha = nnx.MultiHeadAttention(4, 24, 32, decode=False, rngs=rngs)
        self.gru = nnx.GRUCell(24, 16, rngs=rngs)
        self.lstm = nnx.LSTMCell(24, 16, rngs=rngs)
        self.olstm = nnx.OptimizedLSTMCell(24, 16, rngs=rngs)
        self.lora = nnx.LoRA(24, 4, 32, rngs=rngs)
        self.loralin = nnx.LoRALinear(24, 32, lora_rank=4, rngs=rngs)
        self.wn = nnx.WeightNorm(nnx.Linear(24, 32, rngs=rngs), rngs=rngs)
        self.classifier = nnx.Linear(24, 10, rngs=rngs)
        self.lm_head = nnx.Linear(24, 50, use_bias=False, rngs=rngs)
        self.logits_dense = nnx.Linear(24, 50, rngs=rngs)
        self.output = nnx.Linear(24, 50, rngs=rngs)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.att = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
        self.up = nnx.Linear(16, 32, rngs=rngs)


class NnxStack(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def stack(rngs):
            return NnxBlock(rngs)

        self.blocks = stack(rngs)


class LinenLayers(nn.Module):
    @nn.compact
    def __call__(self, tokens, image):
        x = nn.Embed(50, 24, name="token_embedder")(tokens)
        zeros = initializers.zeros
        x = x + self.param("pos_embedding", zeros, (1, 17, 24))
        x = x + self.param("cls", zeros, (1, 1, 24))
        x = nn.LayerNorm()(x)
        x = nn.MultiHeadDotProductAttention(4, qkv_features=32)(x, x)
        x = nn.SelfAttention(4)(x)
        x = nn.DenseGeneral((4, 6), name="dg")(x)
        x = nn.DenseGeneral(24, axis=(-2, -1), name="dg2")(x)
        x = x + jnp.pad(
            nn.ConvLocal(4, (2,), padding="SAME")(x), [(0, 0)] * 2 + [(0, 20)]
        )
        image = nn.Conv(8, (4, 4), name="embedding_conv")(image)
        image = nn.Conv(8, (3, 3), feature_group_count=8, name="dw")(image)
        image = nn.ConvTranspose(8, (3, 3), name="ct")(image)
        image = nn.ConvTranspose(8, (3, 3), transpose_kernel=True, name="ctt")(image)
        x = x[:, 0] + nn.Conv(24, (3, 3))(image).mean((1, 2))
        x = _cells(x)
        outputs = (
            nn.Dense(8, name="pre_logits")(x),
            nn.WeightNorm(nn.Dense(8), name="wn")(x),
        )
        heads = ("classifier", "decoder", "logits_dense", "output_projection")
        return outputs, [nn.Dense(10, name=name)(x) for name in heads]


def _cells(x):
    """Runs one step of every recurrent cell."""
    for kind in (nn.LSTMCell, nn.OptimizedLSTMCell):
        carry = jnp.zeros((2, 16)), jnp.zeros((2, 16))
        x = kind(16)(carry, x)[1]
    for kind in (nn.GRUCell, nn.SimpleCell):
        x = kind(16)(jnp.zeros((2, 16)), x)[1]
    return x


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(4)(y, y)
        return x + nn.Dense(24)(y)[..., :16], None


def _scanned(axis: int) -> Tree:
    """Returns the tree of three blocks under `nn.scan`, stacked on an axis."""
    scan = nn.scan(
        LinenBlock,
        variable_axes={"params": axis},
        split_rngs={"params": True},
        length=3,
    )
    return tree.linen(scan(), jnp.zeros((2, 5, 16)), None)


def _boxed() -> Tree:
    init = nn.with_partitioning(initializers.lecun_normal(), (None, "model"))
    return tree.linen(nn.Dense(8, kernel_init=init), jnp.zeros((2, 4)))


def _nnx_layers(*filters) -> Tree:
    return tree.nnx(lambda: NnxLayers(nnx.Rngs(0)), *filters)


BUILDERS: Builders = {
    "flax nnx layers": _nnx_layers,
    "flax nnx LoRA alone": lambda: _nnx_layers(nnx.LoRAParam),
    "flax nnx stacked": lambda: tree.nnx(lambda: NnxStack(nnx.Rngs(0))),
    "flax linen layers": lambda: tree.linen(
        LinenLayers(), jnp.zeros((2, 17), int), jnp.zeros((2, 8, 8, 3))
    ),
    "flax linen scan 0": lambda: _scanned(0),
    "flax linen scan 1": lambda: _scanned(1),
    "flax linen scan -1": lambda: _scanned(-1),
    "flax linen boxed": _boxed,
}
