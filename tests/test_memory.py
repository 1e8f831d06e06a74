"""Bytes reported are bytes held, and they are as few as promised."""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.tree_util import keystr

import helpers
import nanochat_jax as nj
from nanochat_jax.config import Config
from nanochat_jax.lm.model import gpt
from nanochat_jax.optimizer.flops import update_flops
from nanochat_jax.optimizer.memory import MemoryRow, compiled_bytes, planned_bytes

CONFIGS = Path(__file__).parents[1] / "configs"
BITS8 = {"use_8bit_optim": True}
BITS4 = {"use_8bit_optim": True, "quant_bits": 4}
GALORE = {"use_galore": True, "galore_rank": 16}

VARIANTS = {
    "muon": {},
    "8-bit": BITS8,
    "4-bit": BITS4,
    "galore": GALORE,
    "galore, 8-bit": GALORE | BITS8,
    "galore, 4-bit": GALORE | BITS4,
    "plain galore": GALORE | {"galore_residual": 0.0},
    "plain galore, 8-bit": GALORE | BITS8 | {"galore_residual": 0.0},
    **{
        f"galore, {bits}-bit projector": GALORE | {"projector_bits": bits}
        for bits in (32, 8, 4)
    },
    "galore, 8-bit, float32 projector": GALORE | BITS8 | {"projector_bits": 32},
    "lion": {"fallback": "lion"},
    "stochastic": BITS8 | {"stochastic_rounding": True},
    "8-bit, short blocks": BITS8 | {"quant_block_size": 48},
    "8-bit, small arrays too": BITS8 | {"quant_min_size": 0},
    "8-bit, embeddings whole": BITS8
    | {"quant_min_size": 0, "quantize_embeddings": False},
    "8-bit lion": BITS8 | {"quant_min_size": 0, "fallback": "lion"},
}


def params():
    """Odd axes, a stack, a matrix too small to project, and leaves of every label."""
    return {
        "embed": {"embedding": jnp.zeros((40, 24))},
        "blocks": [{"up": jnp.zeros((301, 64)), "bias": jnp.zeros(64)}],
        "stack": jnp.zeros((2, 96, 257)),
        "small": jnp.zeros((8, 24), jnp.bfloat16),
        "head": {"kernel": jnp.zeros((24, 40))},
    }


def abstract(tree):
    return jax.eval_shape(lambda: tree)


def build(values, tree):
    config = nj.OptimizerConfig(**{"grad_clip": 0.0} | values)
    return nj.build_optimizer(config, tree, matrix_axes=stacked)


def stacked(path, shape):
    """The axes of a stack of matrices, which its name does not tell."""
    del path
    return nj.MatrixAxes(-2, -1) if len(shape) > 2 else None


def held(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_report_counts_the_bytes_of_the_state(variant):
    tx = build(VARIANTS[variant], params())
    report, state = nj.memory_report(tx, params()), jax.jit(tx.init)(params())
    assert report.total_bytes == held(state)
    matrix = jax.tree.leaves(state.inner_states["matrix"])
    assert report.matrix_bytes == held([x for x in matrix if x.ndim > 0])
    assert nj.memory_report(tx, abstract(params())) == report
    for row in report.rows:
        assert row.bytes == row.entries * jnp.dtype(row.dtype).itemsize


@pytest.mark.parametrize("name", helpers.TRANSFORMS)
def test_the_report_counts_the_state_of_any_transform(name):
    tx, _ = helpers.compiled(name)
    report = nj.memory_report(tx, helpers.params())
    assert report.total_bytes == held(tx.init(helpers.params()))
    assert report.total_params == sum(x.size for x in jax.tree.leaves(helpers.params()))


def test_the_rows_say_what_is_held_for_what():
    tree = {"up": jnp.zeros((128, 512)), "bias": jnp.zeros(64)}
    report = nj.memory_report(build(GALORE | BITS8 | {"galore_rank": 32}, tree), tree)
    rows = {(row.label, row.field): row for row in report.rows}
    expected = [
        ("momentum", "int8", 32 * 512, 32 * 512),
        ("momentum.scales", "bfloat16", 32 * 4, 2 * 32 * 4),
        ("basis", "uint8", 128 * 16, 128 * 16),  # two codes a byte
        ("basis.scales", "bfloat16", 128, 2 * 128),
    ]
    for row in expected:
        assert rows["matrix", row[0]] == MemoryRow("matrix", *row)
    assert rows["vector", "mu"].bytes == rows["vector", "nu"].bytes == 4 * 64
    counts = [row for row in report.rows if row.label == "other"]
    assert {(row.field, row.dtype) for row in counts} == {("count", "int32")}
    assert sum(row.bytes for row in report.rows) == report.total_bytes


def test_baselines_and_reductions_follow_from_the_labels():
    report = nj.memory_report(build({}, params()), params())
    matrix = 301 * 64 + 2 * 96 * 257 + 8 * 24
    assert report.params == {
        "matrix": matrix, "embedding": 960, "head": 960, "vector": 64,
    }  # fmt: skip
    assert report.fp32_muon_bytes == report.matrix_bytes == 4 * matrix
    assert report.fp32_muon_adamw_bytes == 4 * matrix + 8 * (960 + 960 + 64)
    said = report.to_dict()
    assert said["matrix"] == {
        "params": matrix, "state_bytes": 4 * matrix, "fp32_muon_bytes": 4 * matrix,
        "reduction": 0.0,
    }  # fmt: skip
    assert said["total"]["params"] == matrix + 960 + 960 + 64
    total = report.total_bytes / report.fp32_muon_adamw_bytes
    assert said["total"]["reduction"] == pytest.approx(1 - total)
    # Float32 Muon with AdamW is the baseline, but for a few counts.
    assert 0 <= report.total_bytes - report.fp32_muon_adamw_bytes < 100


def test_labels_can_be_given_and_there_may_be_no_matrix():
    tree = {"up": jnp.zeros((8, 8))}
    report = nj.memory_report(optax.scale_by_adam(), tree, {"up": "vector"})
    assert report.params == {"vector": 64}
    assert report.matrix_bytes == report.fp32_muon_bytes == 0
    assert report.to_dict()["matrix"]["reduction"] == 0.0
    bare = nj.memory_report(nj.momentum(), jnp.zeros((8, 8)))
    assert bare.rows == (MemoryRow("matrix", "momentum", "float32", 64, 256),)


@pytest.mark.parametrize(
    ("name", "most", "whole"),
    [
        ("nano_125m", 1.0, 1.0001),
        ("nano_125m_8bit", 0.258, 0.26),
        ("nano_125m_galore", 0.40, 0.68),
        ("nano_125m_8bit_galore", 0.12, 0.20),
    ],
)
def test_the_promised_reductions_at_nano_125m(name, most, whole):
    """Of the matrices' state, and of the whole optimizer's."""
    config = Config.from_toml(CONFIGS / f"{name}.toml")
    _, tree = gpt.abstract_model(config)
    report = nj.memory_report(
        nj.build_optimizer(config, tree, matrix_axes=stacked), tree
    )
    assert report.matrix_bytes <= most * report.fp32_muon_bytes
    assert report.total_bytes <= whole * report.fp32_muon_adamw_bytes
    assert report.matrix_bytes == pytest.approx(
        (1 - report.to_dict()["matrix"]["reduction"]) * report.fp32_muon_bytes
    )
    assert report.full_rank == ()
    if config.use_galore:
        assert config.rank == 256
        assert config.projector_bits == (4 if config.use_8bit_optim else 8)


FALLBACK = {
    "adamw": ({}, {"mu": "int8", "nu": "uint8"}),
    "4 bits are for matrices": ({"quant_bits": 4}, {"mu": "int8", "nu": "uint8"}),
    "lion": ({"fallback": "lion"}, {"mu": "int8"}),
    "whole": ({"quantize_embeddings": False}, {"mu": "float32", "nu": "float32"}),
}


@pytest.mark.parametrize("case", FALLBACK)
def test_eight_bits_cover_embeddings_and_head_but_not_small_vectors(case):
    values, stored = FALLBACK[case]
    tree = params() | {"long": {"bias": jnp.zeros(5000)}}
    tx = build(BITS8 | values | {"quant_min_size": 200}, tree)
    rows = nj.memory_report(tx, tree).rows
    fields = lambda label: {
        row.field: row.dtype
        for row in rows
        if row.label == label and not row.field.endswith(".scales")
    }
    assert fields("embedding") == fields("head") == stored
    by_size = {
        (row.field, row.dtype): row.entries for row in rows if row.label == "vector"
    }
    assert by_size["mu", "float32"] == 64  # under `quant_min_size`
    assert sum(by_size.values()) > 5000


def square_and_wide():
    return abstract(
        {
            "square": jnp.zeros((256, 256)),
            "wide": jnp.zeros((256, 1024)),
            "odd": jnp.zeros((3, 520, 260)),
            "bias": jnp.zeros(256),
        }
    )


STORAGE = {
    "float32": {"projector_bits": 32},
    "int8 projector": {"projector_bits": 8},
    "8-bit": BITS8,
    "8-bit, float32 projector": BITS8 | {"projector_bits": 32},
    "4-bit": BITS4,
}


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("rank", [32, 128, 192, 240, 300])
def test_matrices_are_projected_where_that_saves_bytes(storage, rank):
    tree, values = square_and_wide(), STORAGE[storage]
    low = GALORE | values | {"galore_rank": rank}
    report = nj.memory_report(build(low, tree), tree)
    kept = set()
    for path, leaf in jax.tree.leaves_with_path(tree):
        if leaf.ndim < 2:
            continue
        one = nj.memory_report(build(low, leaf), leaf)
        whole = nj.memory_report(build(values, leaf), leaf)
        basis = "basis" in {row.field for row in one.rows}
        assert one.matrix_bytes < whole.matrix_bytes or not basis
        assert one.matrix_bytes == whole.matrix_bytes or basis
        kept |= set() if basis else {keystr(path)}
    assert set(report.full_rank) == kept


@pytest.mark.parametrize("values", [BITS8, BITS4], ids=["8-bit", "4-bit"])
@pytest.mark.parametrize("shape", [(8, 24), (64, 128), (3, 96, 128)])
@pytest.mark.parametrize("rank", [2, 8, 32])
def test_projecting_a_small_matrix_never_costs_bytes(values, shape, rank):
    """If its parts are quantised, which `quant_min_size` may forbid."""
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    values = values | {"quant_min_size": 0}
    low = nj.memory_report(build(GALORE | values | {"galore_rank": rank}, leaf), leaf)
    assert low.matrix_bytes <= nj.memory_report(build(values, leaf), leaf).matrix_bytes


def test_high_ranks_leave_square_matrices_whole_and_say_so():
    tree = square_and_wide()
    values = GALORE | {"galore_rank": 192, "projector_bits": 32}
    report = nj.memory_report(build(values, tree), tree)
    assert set(report.full_rank) == {"['square']", "['odd']"}
    assert nj.memory_report(build({}, tree), tree).full_rank == ()


def test_only_matrices_are_listed_as_left_at_full_rank():
    tree = {"up": jnp.zeros((64, 64)), "bias": jnp.zeros(64), "absent": None}
    tx = nj.galore(optax.scale_by_adam(), rank=60)
    assert nj.memory_report(tx, tree).full_rank == ("['up']",)


@pytest.mark.parametrize("values", [{}, BITS8, {"weight_decay": 0.1}])
def test_compiled_bytes_count_what_goes_in_and_what_comes_out(values):
    tree = {"up": jnp.zeros((64, 256))}
    tx = build(values, tree)
    planned, state = compiled_bytes(tx, abstract(tree)), tx.init(tree)
    assert set(planned) == {"temp_bytes", "argument_bytes", "output_bytes"}
    assert all(type(count) is int for count in planned.values())
    # Parameters are read for weight decay only.
    read = 2 if "weight_decay" in values else 1
    slack = 8 * (2 + len(jax.tree.leaves((tree, state))))  # pointers of the result
    assert planned["argument_bytes"] == read * held(tree) + held(state)
    assert 0 <= planned["output_bytes"] - held(tree) - held(state) <= slack
    assert planned["temp_bytes"] > 0


@helpers.on_processors
def test_a_donated_state_is_updated_in_place():
    """So that it takes no temporaries beside it."""
    tree = {"up": jnp.zeros((64, 256))}
    assert compiled_bytes(nj.momentum(), tree)["temp_bytes"] == 0


def test_planned_bytes_count_a_donated_argument_once():
    add = lambda x, y: x @ y + x
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    plans = [
        planned_bytes(jax.jit(add, donate_argnums=donated).lower(x, x).compile())
        for donated in ((), (0,))
    ]
    size = 4 * 64 * 64
    assert [plan["argument_bytes"] for plan in plans] == [2 * size, 2 * size]
    assert [plan["alias_bytes"] for plan in plans] == [0, size]
    for plan in plans:
        new = plan["output_bytes"] - plan["alias_bytes"]
        assert plan["peak_bytes"] == 2 * size + new + plan["temp_bytes"]


HEADS = {  # a block of attention, its kernels as Flax has them and in two axes
    "query": {"kernel": (256, 4, 64)},
    "key": {"kernel": (256, 2, 64)},
    "value": {"kernel": (256, 2, 64)},
    "out": {"kernel": (4, 64, 256)},
}
FLAT = {
    "query": {"kernel": (256, 256)},
    "key": {"kernel": (256, 128)},
    "value": {"kernel": (256, 128)},
    "out": {"kernel": (256, 256)},
}


@pytest.mark.parametrize("rank", [None, 16, 64])
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_kernels_of_attention_take_the_bytes_of_the_matrices_they_are(bits, rank):
    """By names alone; today's state of heads at rank 64 was eight times too large."""
    shaped = lambda tree: {
        "attention": jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
            tree,
            is_leaf=lambda node: isinstance(node, tuple),
        )
    }
    tx = nj.muon(0.02, bits=bits, rank=rank)
    heads, flat = (nj.memory_report(tx, shaped(tree)) for tree in (HEADS, FLAT))
    assert heads.rows == flat.rows
    assert heads.full_rank == flat.full_rank == ()
    config = nj.OptimizerConfig(use_galore=rank is not None, galore_rank=rank)
    flops = [update_flops(config, shaped(tree)) for tree in (HEADS, FLAT)]
    assert flops[0] == flops[1]


def test_frozen_parameters_are_left_out():
    """With them a LoRA of 3 % of the parameters would be a reduction by 97 %."""
    lora = {"lora_a": jnp.ones((64, 4)), "lora_b": jnp.ones((4, 64))}
    params = {"up": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64), "lora": lora}}
    labels = {"up": {"kernel": "frozen", "bias": "frozen", "lora": None}}
    report = nj.memory_report(nj.muon(0.02, labels=labels), params)
    assert report.params == {"matrix": 2 * 4 * 64}
    assert report.to_dict()["total"]["reduction"] == pytest.approx(0, abs=0.01)
    assert report.total_bytes >= report.fp32_muon_bytes


def test_parameters_that_are_masked_from_muon_are_counted_too():
    params = {
        "a": {"kernel": jnp.ones((40, 8))},
        "embed": {"embedding": jnp.ones((9, 8))},
    }
    tx = optax.masked(nj.muon(0.02), {"a": True, "embed": False})
    report = nj.memory_report(tx, params)
    assert report.params == {"matrix": 320, "embedding": 72}
    assert report.matrix_bytes == 4 * 320
