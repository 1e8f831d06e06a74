"""A run on a mesh, on paper: shapes of known models on devices that are not there."""

import dataclasses
import json
import re

import pytest

from nanochat_jax import cli
from nanochat_jax.config import Config, presets
from nanochat_jax.lm.model import count_flops_per_token, gpt, param_sharding
from nanochat_jax.lm.planning import mesh_plan

NANO = Config(
    dim=768, n_layers=1, n_heads=12, vocab_size=50257, pad_vocab_to=128,
    scan_layers=True, max_seq_len=128, mesh={"fsdp": 8}, galore_rank=192,
)  # fmt: skip
# Of a block of Llama 2 7B: four kernels of attention and three of the feed-forward.
BLOCK_7B = 4 * 4096**2 + 3 * 4096 * 11008
TABLES_7B = 2 * 32_000 * 4096


def plan(capsys, *args):
    assert cli.main(["plan", "--model", "7b", "--n-layers", "2", *args]) == 0
    return capsys.readouterr().out


def test_a_plan_of_7b_has_the_sizes_of_its_shapes(capsys):
    found = json.loads(plan(capsys, "--mesh", "fsdp=64", "--json"))
    vectors = 4 * (2 * 2 * 4096 + 4096)  # whole on each device
    assert found["total"]["params"] == 2 * BLOCK_7B + TABLES_7B + vectors // 4
    divided = 4 * (2 * BLOCK_7B + TABLES_7B) // 64
    assert found["device_bytes"]["params"] == divided + vectors
    assert found["device_bytes"]["gradients"] == divided + vectors
    assert found["device_bytes"]["state.matrix.momentum"] == 4 * 2 * BLOCK_7B // 64
    assert found["device_bytes"]["state.head.nu"] == 4 * TABLES_7B // 2 // 64
    parts = [x for k, x in found["device_bytes"].items() if k.count(".") == 2]
    assert found["device_bytes"]["state"] == sum(parts)
    assert found["devices"] == 64 and found["tokens_per_step"] == 64 * 4096
    sent = {x["what"]: x for x in found["collectives"]}
    # Kernels in bfloat16: those of blocks once forward and once backward, and the head.
    assert sent["parameters"]["bytes"] == 2 * (2 * 2 * BLOCK_7B + TABLES_7B // 2)
    assert sent["parameters"]["count"] == 2 * 2 * 7 + 1
    assert sent["gradients"]["kind"] == "reduce-scatter"
    assert sent["gradients"]["bytes"] == 2 * (2 * BLOCK_7B + TABLES_7B // 2)
    assert set(found["variants"]) == set(mesh_plan.VARIANTS)
    assert found["model"]["batch_size"] == 64
    assert found["model"]["n_layers"] == 2


def test_a_plan_says_what_follows_and_what_was_set_otherwise(capsys):
    text = plan(capsys, "--mesh", "data=2,fsdp=8", "--use-galore")
    assert max(map(len, text.splitlines())) <= 80
    text = " ".join(text.split())  # in place of line breaks
    assert "Model 7b: compute_dtype bfloat16" in text
    assert "dim 4096, n_heads 32, n_kv_heads 32, ffn_mult 2.6875" in text
    assert "batch_size 16" in text
    assert "set otherwise: n_layers 2 (not 32)" in text
    assert "On each of 16 devices" in text
    for word in ("reduce-scatter", "owners", "Newton-Schulz", "busiest"):
        assert word in text
    assert "times an even share" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "9b", "--mesh", "fsdp=2"], r"`--model` must be one of .*'9b'"),
        (["--model", "1b", "--depth", "2"], "both give the shape"),
        (["--depth", "2", "--mesh", "fsdp=3"], "multiple of `data` x `fsdp`"),
        (["--model", "1b", "--mesh", "model=3"], "`mesh` must give"),
    ],
)
def test_what_cannot_be_planned_is_refused(args, message, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["plan", *args])
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "billions"), [("1b", 1.10), ("7b", 6.74), ("70b", 68.98)]
)
def test_models_have_as_many_parameters_as_their_names_say(name, billions):
    """Those that their papers count."""
    config = Config.from_values({"model": name}, "test")
    kernels = count_flops_per_token(config, seq_len=0) // 6
    tables = config.vocab_size * config.dim
    assert (kernels + tables) / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"use_8bit_optim": True},
        {"use_8bit_optim": True, "quant_bits": 4},
        {"use_galore": True},
        {"use_galore": True, "use_8bit_optim": True},
        {"use_galore": True, "use_8bit_optim": True, "galore_residual": 0.0},
    ],
    ids=str,
)
def test_a_device_of_eight_holds_an_eighth_of_the_state_of_nano(values):
    held = mesh_plan.plan_scale(dataclasses.replace(NANO, **values)).held
    assert held.total_bytes / 8 <= held.device_bytes <= 1.03 * held.total_bytes / 8


def test_a_vocabulary_that_is_not_divided_is_named_and_lies_by_columns():
    config = dataclasses.replace(NANO, pad_vocab_to=1)
    params = gpt.abstract_model(config)[1]
    params = param_sharding.place(
        params, param_sharding.abstract_mesh(config.mesh), config
    )
    assert tuple(params["embed"]["embedding"].sharding.spec) == (None, "fsdp")
    text = param_sharding.mesh_summary(params, config)
    assert "fsdp does not divide the 50257 rows of `embedding`" in text
    assert "`pad_vocab_to = 128` mends it" in text
    assert "does not divide" not in param_sharding.mesh_summary(
        gpt.abstract_model(NANO)[1], NANO
    )


def test_matrices_of_the_busiest_device_are_counted():
    """Two matrices of each shape on eight devices: one of each on the busiest."""
    plan = mesh_plan.plan_scale(dataclasses.replace(NANO, n_layers=2))
    even = plan.flops["update_newton_schulz"] / 8
    # 8 of attention, 4 gates and ups, and 2 downs, of which each device has one.
    assert even < plan.busiest < 8 * even
    assert plan.busiest == mesh_plan.plan_scale(NANO).busiest


def test_every_model_can_be_had_by_name():
    assert {name: presets.shape_of(name, {})["dim"] for name in presets.MODELS} == {
        "1b": 2048, "7b": 4096, "70b": 8192,
    }  # fmt: skip
