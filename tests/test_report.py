"""What a run prints about its optimizer is what is held."""

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

import nanochat_jax as nj
from nanochat_jax.config import Config
from nanochat_jax.lm.model import gpt
from nanochat_jax.lm.planning import breakdown, optimizer_summary

CONFIGS = Path(__file__).parents[1] / "configs"
FLOAT32 = {"mu": "float32", "nu": "float32"}
BITS8 = {"mu": "int8", "nu": "dynamic8"}
STORAGE = {
    "nano_125m": ({"momentum": "float32"}, FLOAT32),
    "nano_125m_8bit": ({"momentum": "int8"}, BITS8),
    "nano_125m_galore": ({"momentum": "float32", "basis": "int8"}, FLOAT32),
    "nano_125m_8bit_galore": ({"momentum": "int8", "basis": "int4"}, BITS8),
}


def planned(config):
    _, params = gpt.abstract_model(config)
    held = nj.memory_report(nj.build_optimizer(config, params), params)
    return held, breakdown.parameter_groups(config, params, held)


@pytest.mark.parametrize("name", STORAGE)
def test_groups_and_lines_say_how_each_field_is_stored(name):
    config = Config.from_toml(CONFIGS / f"{name}.toml")
    held, groups = planned(config)
    matrix, embedding = STORAGE[name]
    stored = {group["label"]: group["storage"] for group in groups}
    assert matrix.items() <= stored["matrix"].items()
    assert stored["embedding"] == embedding
    assert stored["vector"] == FLOAT32  # 768 entries are under `quant_min_size`
    said = optimizer_summary.optimizer_summary(config, held).splitlines()
    text = lambda fields: ", ".join(f"{k} {v}" for k, v in fields.items())
    [details] = [line for line in said if line.startswith("  Details:")]
    assert all(f"{field} {codec}" in details for field, codec in matrix.items())
    assert f"  Embedding:         {text(embedding)}" in said
    assert f"  Vector:            {text(FLOAT32)}" in said
    table = io.StringIO()
    Console(file=table, width=160).print(optimizer_summary.group_table(groups))
    assert all(f"{k} {v}" in table.getvalue() for k, v in embedding.items())


def test_the_lines_give_the_matrices_and_the_whole_optimizer():
    config = Config.from_toml(CONFIGS / "nano_125m_8bit.toml")
    held, _ = planned(config)
    said = optimizer_summary.optimizer_summary(config, held)
    assert "Memory reduction:  74.6 % of FP32 Muon's state" in said
    assert "FP32 341.5 MB -> 86.7 MB (momentum int8)" in said
    assert "FP32 Muon + AdamW 650.7 MB -> 165.4 MB, 74.6 % less" in said
    full = Config.from_toml(CONFIGS / "nano_125m.toml")
    assert "650.7 MB, 0.0 % less" in optimizer_summary.optimizer_summary(
        full, planned(full)[0]
    )


def test_a_field_that_is_stored_in_two_ways_names_both():
    config = Config(use_8bit_optim=True, dim=64, n_layers=1, quant_min_size=8000)
    held, _ = planned(
        config
    )  # 64 x 64 in attention, 64 x 172 in the feed-forward layer
    assert breakdown.storage(config, held, "matrix") == {"momentum": "float32 and int8"}
    config = dataclasses.replace(config, quantize_embeddings=False)
    assert breakdown.storage(config, planned(config)[0], "embedding") == FLOAT32
