"""Optimizers of every variant, and a small model's parameters on meshes of devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import nanochat_jax as nj

GALORE = {"use_galore": True, "galore_rank": 8, "galore_update_freq": 2}
PLAIN = {**GALORE, "galore_residual": 0.0}
INT8 = {"use_8bit_optim": True, "quant_block_size": 8, "quant_min_size": 1}
VARIANTS = {
    "muon": {},
    "muon_8bit": INT8,
    "muon_4bit": {**INT8, "quant_bits": 4},
    "galore": GALORE,
    "galore_8bit": GALORE | INT8,
    "galore_plain": PLAIN,
    "galore_plain_8bit": PLAIN | INT8,
}
MESHES = {
    "8": ((8,), ("fsdp",)),
    "4x2": ((4, 2), ("fsdp", "tensor")),
    "2x2x2": ((2, 2, 2), ("data", "fsdp", "tensor")),
}
SHAPES = {
    "up": {"kernel": (32, 64)},
    "down": {"kernel": (64, 32)},
    "query": {"kernel": (32, 4, 16)},  # seen as (32, 64)
    "out": {"kernel": (4, 16, 32)},  # seen as (64, 32)
    "embed": {"embedding": (48, 32)},
    "norm": {"scale": (32,)},
}


AXES = {
    "query/kernel": nj.MatrixAxes(0, (1, 2)),
    "out/kernel": nj.MatrixAxes((0, 1), 2),
}


def leaves(seed):
    """A tree of normal arrays with the shapes of the parameters."""
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(
        lambda shape: jnp.asarray(draw(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def make_mesh(name, kind=AxisType.Auto):
    sizes, names = MESHES[name]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


def shardings(mesh):
    """Shards features over `fsdp`, and others over `tensor`, if the mesh has it."""
    other = "tensor" if "tensor" in mesh.axis_names else None
    specs = {1: ("fsdp",), 2: ("fsdp", other), 3: ("fsdp", other, None)}
    placed = jax.tree.map(
        lambda shape: NamedSharding(mesh, P(*specs[len(shape)])),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    placed["out"]["kernel"] = NamedSharding(mesh, P(other, None, "fsdp"))
    return placed


def build(name, params, **kwargs):
    # A global norm is added up in another order on several devices.
    values = {"ns_dtype": "float32", "grad_clip": 0.0, **VARIANTS[name], **kwargs}
    config = nj.OptimizerConfig(**values)
    axes = lambda path, shape: AXES.get(path)
    return nj.build_optimizer(config, params, matrix_axes=axes)
