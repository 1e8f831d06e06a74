"""Numbers in the tables of README and docs are those that the code gives today."""

import dataclasses
import re
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest

import nanochat_jax as nj
from nanochat_jax.config import Config
from nanochat_jax.lm.model import gpt
from nanochat_jax.lm.planning import mesh_plan, run_memory
from nanochat_jax.lm.training import compile_train_step

ROOT = Path(__file__).parents[1]


def rows(file, header):
    """Returns the cells of the table of a page that has this header."""
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = text[text.index(f"| {header} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def parametrized(file, header):
    found = rows(file, header)
    assert found
    return pytest.mark.parametrize("row", found, ids=[row[0] for row in found])


@pytest.fixture(scope="module")
def nano():
    config = Config.from_toml(ROOT / "configs/nano_125m.toml")
    return gpt.abstract_model(config)[1]


def shares(report):
    return [
        f"{100 * report.matrix_bytes / report.fp32_muon_bytes:.1f} %",
        f"{100 * report.total_bytes / report.fp32_muon_adamw_bytes:.1f} %",
    ]


@parametrized("README.md", "write | momentum | optimizer | loss | choose it")
def test_shares_of_variants_are_those_of_the_memory_report(row, nano):
    code = row[0].strip("`")
    tx = eval(code, {"nj": nj, "optax": optax})
    assert row[1:3] == shares(nj.memory_report(tx, nano))


@parametrized(
    "docs/guide/choose.md",
    "what you have | variant | arguments of `muon` | state of matrices | loss",
)
def test_shares_in_the_guide_are_those_of_the_memory_report(row, nano):
    arguments = row[2].strip("`").replace("none", "")
    tx = eval(f"nj.muon(0.02, {arguments})", {"nj": nj})
    assert float(row[3].split()[0]) == float(
        shares(nj.memory_report(tx, nano))[0].split()[0]
    )


# Rows of the table of losses by the row of the README, a rank being that of the model.
MEASURED = {
    "nj.muon(0.02)": "float32 Muon",
    "nj.muon(0.02, bits=8)": "8-bit",
    "nj.muon(0.02, bits=4)": "4-bit (`Normal4`)",
    "nj.muon(0.02, bits=8, rank=1/8, complement_bits=2)": "both, rest 2, rank d/8",
    "nj.muon(0.02, bits=8, rank=1/4)": "both, residual",
    "nj.muon(0.02, bits=8, rank=1/8)": "`galore_8bit:galore_rank=32`",
    "nj.muon(0.02, rank=1/4, complement=0.0)": "plain GaLore",
    "optax.adamw(7e-4)": "AdamW, lr 0.0007",
}


@parametrized("README.md", "write | momentum | optimizer | loss | choose it")
def test_losses_of_variants_are_those_that_were_measured(row):
    header = (
        "variant | seeds | validation loss | bits per byte | ratio | matrix state MB "
        "| whole state MB"
    )
    measured = {cells[0]: cells[4] for cells in rows("docs/RESULTS.md", header)}
    # Of one seed, at the rate where float32 Muon had 1.2289.
    one = {
        name: float(loss) for name, loss in rows("docs/RESULTS.md", "variant | loss")
    }
    measured |= {name: f"{loss / 1.2289:.3f}" for name, loss in one.items()}
    assert measured[MEASURED[row[0].strip("`")]].split(" ")[0] == row[3]


BIASES = {
    "query": (4, 16),
    "out": (64,),
    "conv": (32,),
    "blocks/up": (12, 256),
    "up": (256,),
}


def test_parameters_go_where_the_readme_says():
    """With a bias beside each kernel, which tells what the kernel is."""
    table = rows("README.md", "parameter | shape | seen as | optimizer")
    params = {}
    for path, shape, *_ in table:
        *above, name = path.strip("`").split("/")
        node = params
        for part in above:
            node = node.setdefault(part, {})
        node[name] = jnp.zeros([int(n) for n in shape.split("x")])
        for end, bias in BIASES.items():
            if name == "kernel" and "/".join(above).endswith(end):
                node.setdefault("bias", jnp.zeros(bias))
    sizes = lambda shape: "" if shape is None else "x".join(map(str, shape))
    found = {
        leaf.path: [sizes(leaf.view), leaf.optimizer]
        for leaf in nj.describe(nj.muon(0.02, bits=8), params).leaves
    }
    said = {row[0].strip("`"): row[2:] for row in table}
    assert said == {path: found[path] for path in said}


@parametrized(
    "docs/RESULTS.md",
    "variant | configuration | state of matrices | of float32 Muon's | "
    "whole optimizer, of float32 Muon + AdamW",
)
def test_state_of_configurations_is_that_of_the_memory_report(row):
    file, *flags = re.findall(r"`([^`]+)`", row[1])
    config = Config.from_toml(ROOT / "configs" / file)
    for name, value in (flag.removeprefix("--").split() for flag in flags):
        config = dataclasses.replace(config, **{name.replace("-", "_"): int(value)})
    params = gpt.abstract_model(config)[1]
    report = nj.memory_report(nj.build_optimizer(config, params), params)
    assert row[2:] == [f"{report.matrix_bytes / 1e6:.1f} MB", *shares(report)]


PROMISED = {
    "8-bit": {"bits": 8},
    "GaLore, rank 256": {"rank": 256},
    "GaLore, rank 192, rest in 2 bits": {"rank": 192, "complement_bits": 2},
    "both, rank 256": {"bits": 8, "rank": 256},
    "both, rank 96, rest in 2 bits": {"bits": 8, "rank": 96, "complement_bits": 2},
    "4-bit": {"bits": 4},
}


@parametrized(
    "docs/RESULTS.md",
    "variant | memory promised | of the matrices' | of the whole optimizer's | "
    "loss promised | measured",
)
def test_what_was_promised_is_beside_what_the_report_says(row, nano):
    report = nj.memory_report(nj.muon(0.02, **PROMISED[row[0]]), nano)
    assert row[2:4] == shares(report)


@pytest.fixture(scope="module")
def planned():
    """Returns a function from a row of a mesh to its plan, and those of variants."""
    known = {}

    def plan(row):
        key = row[0], row[1]
        if key not in known:
            axes = dict(x.split("=") for x in row[1].strip("`").split(","))
            values = {"model": row[0], "mesh": {k: int(n) for k, n in axes.items()}}
            values["ns_dtype"] = "bfloat16"
            found = mesh_plan.plan_scale(Config.from_values(values, "test"))
            known[key] = found, mesh_plan.side_by_side(found)
        return known[key]

    return plan


@pytest.mark.slow
@parametrized(
    "docs/SCALING.md",
    "model | mesh | parameters | parameters sent | gradients sent | activations sent | "
    "Muon sent | GaLore sent | GaLore without residual sent",
)
def test_bytes_that_devices_hold_and_send_are_those_of_the_plan(row, planned):
    plan, variants = planned(row)
    sent = {"parameters": 0, "gradients": 0, "activations": 0}
    for part in plan.forward:
        if part.what in sent:
            sent[part.what] += part.sent_bytes
    updates = [
        variants[name]["sent_bytes"] for name in ("muon", "galore", "galore_plain")
    ]
    sizes = [plan.device_bytes["params"], *sent.values(), *updates]
    assert row[2:] == [f"{size / 1e6:,.0f}" for size in sizes]


@pytest.mark.slow
@parametrized(
    "docs/SCALING.md",
    "model | mesh | muon | muon_8bit | muon_4bit | galore | galore_8bit | galore_4bit",
)
def test_state_on_a_device_is_that_of_the_plan(row, planned):
    names = ("muon", "muon_8bit", "muon_4bit", "galore", "galore_8bit", "galore_4bit")
    held = [planned(row)[1][name]["state_bytes"] for name in names]
    assert row[2:] == [f"{size / 1e6:,.1f}" for size in held]


@pytest.mark.slow
@parametrized(
    "docs/SCALING.md",
    "model | mesh | tokens | Muon, GaLore | without residual | busiest",
)
def test_shares_of_the_update_are_those_of_the_plan(row, planned):
    plan, variants = planned(row)
    share = lambda name: 100 * variants[name]["update_share"]
    even = plan.flops["update_newton_schulz"] / plan.devices
    assert row[2:] == [
        f"{plan.config.tokens_per_step:,}",
        f"{share('muon'):.1f} %",
        f"{share('galore_plain'):.2f} %",
        f"{plan.busiest / even:.2f}",
    ]


@pytest.mark.slow
@parametrized(
    "README.md", "7B, one sequence of 1,024 tokens | weights | state | the rest | step"
)
def test_the_whole_step_of_7b_is_that_of_its_plan(row):
    flags = {
        "8-bit Muon, full rank": {},
        "4-bit Muon, full rank": {"quant_bits": 4},
        "GaLore, rank 1024, both": {
            "use_galore": True, "galore_rank": 1024, "galore_residual": 0.0,
        },
    }  # fmt: skip
    values = {
        "model": "7b", "batch_size": 1, "seq_len": 1024, "param_dtype": "bfloat16",
        "update_in_backward": True, "use_8bit_optim": True, "ns_dtype": "bfloat16",
        **flags[row[0]],
    }  # fmt: skip
    run = run_memory.abstract_run(Config.from_values(values, "test"))
    step = compile_train_step(run)
    found = run_memory.step_bytes(run_memory.plan_run(run, step))
    names = ("weights_bytes", "state_bytes", "temp_bytes", "peak_bytes")
    wanted = [float(cell.removesuffix(" GB")) for cell in row[1:]]
    assert [found[name] / 1e9 for name in names] == pytest.approx(wanted, abs=0.11)
