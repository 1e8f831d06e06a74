"""Models of MaxText, scanned on the second axis and not, with heads and experts."""

import os

import jax
from flax import nnx

from builders.tree import Builders, Tree

SMALL = (
    "base_emb_dim=32", "base_mlp_dim=48", "base_num_query_heads=4",
    "base_num_kv_heads=2", "head_dim=8", "base_num_decoder_layers=2",
    "vocab_size=64", "max_target_length=16", "per_device_batch_size=1",
    "attention=dot_product", "skip_jax_distributed_system=True",
    "override_model_config=True", "enable_checkpointing=False", "run_name=small",
)  # fmt: skip


def _model(*options: str) -> Tree:
    from maxtext.configs import pyconfig
    from maxtext.utils import maxtext_utils, model_creation_utils
    from maxtext.utils.globals import MAXTEXT_PKG_DIR

    base = os.path.join(MAXTEXT_PKG_DIR, "configs", "base.yml")
    config = pyconfig.initialize([None, base, *SMALL, *options])
    devices = maxtext_utils.create_device_mesh(config)
    mesh = jax.sharding.Mesh(devices, config.mesh_axes)
    _, model = model_creation_utils.create_nnx_abstract_model(config, mesh)
    return Tree(nnx.state(model, nnx.Param), model)


BUILDERS: Builders = {
    "maxtext": lambda: _model("scan_layers=False"),
    "maxtext scanned": lambda: _model("scan_layers=True"),
    "maxtext mixtral": lambda: _model(
        "model_name=mixtral-8x7b",
        "num_experts=4",
        "base_moe_mlp_dim=48",
        "scan_layers=True",
    ),
    "maxtext gemma3": lambda: _model("model_name=gemma3-4b", "scan_layers=False"),
    "maxtext deepseek": lambda: _model(
        "model_name=deepseek3-tiny",
        "scan_layers=False",
        "base_num_kv_heads=4",
        "first_num_dense_layers=1",
        "mtp_num_layers=0",
    ),
}
