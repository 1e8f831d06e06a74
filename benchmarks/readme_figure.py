"""Draws the figure of the README: loss, optimizer state and memory of a whole step.

    python benchmarks/readme_figure.py            # draws benchmarks/readme_figure.json
    python benchmarks/readme_figure.py --plan     # compiles its steps anew, and draws

Losses are those of docs/RESULTS.md, whose command the JSON file names. Bytes of a step
are what the compiler plans for it; nothing is allocated.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import common
import jax
from matplotlib.figure import Figure
from train_step import BOTH, EIGHT, PEERS, VARIANTS

from nanochat_jax.config import Config
from nanochat_jax.experiments import figures, labels
from nanochat_jax.lm.model import build_optimizer, gpt
from nanochat_jax.lm.runtime import tree_bytes
from nanochat_jax.lm.training import Run, compile_train_step
from nanochat_jax.optimizer import planned_bytes

NUMBERS = Path(__file__).with_suffix(".json")
OUTPUT = Path(__file__).parents[1] / "docs/figures/loss_and_memory.png"
OURS, PEER = figures.COLORS[0], figures.COLORS[1]

STEPS = {
    "AdamW, optax": ({}, PEERS["optax.adamw"]),
    "Muon, optax.contrib": ({}, PEERS["optax.contrib.muon"]),
    "Muon": ({}, build_optimizer),
    "8-bit": (EIGHT, build_optimizer),
    "GaLore + 8-bit": (BOTH, build_optimizer),
    "8-bit, bfloat16,\nin the backward pass": (
        VARIANTS["muon_8bit, in backward, bf16"],
        build_optimizer,
    ),
}


def plan_step(config, build):
    """Returns the planned bytes of a step, by what they hold."""
    graphdef, params = gpt.abstract_model(config)
    tx = build(config, params)
    step = compile_train_step(Run(config, graphdef, params, tx, None, None))
    weights, state = tree_bytes(params), tree_bytes(jax.eval_shape(tx.init, params))
    peak = planned_bytes(step)["peak_bytes"]
    return {"weights": weights, "state": state, "rest": peak - weights - state}


def plan():
    """Writes the bytes of all steps into the file of numbers."""
    jax.config.update("jax_platforms", "cpu")
    config = Config.from_toml(NUMBERS.parents[1] / "configs/nano_125m.toml")
    one = dataclasses.replace(config, batch_size=1, seq_len=256, grad_accum_steps=1)
    rows = {}
    for name, (settings, build) in STEPS.items():
        rows[name] = plan_step(dataclasses.replace(one, **settings), build)
        print(name.replace("\n", " "), rows[name], flush=True)
    numbers = json.loads(NUMBERS.read_text())
    command = "python benchmarks/readme_figure.py --plan"
    numbers["step"] = {"command": command, "machine": common.machine(), "bytes": rows}
    NUMBERS.write_text(json.dumps(numbers, indent=2) + "\n")


def draw_loss(axes, rows):
    """Draws losses over those of float32 Muon by the bytes of the state."""
    points = {}
    for name, row in rows.items():
        peer = row["whose"] == "published"
        color, marker = (PEER, "s") if peer else (OURS, "o")
        axes.errorbar(
            [row["state_mb"]],
            [row["ratio"]],
            yerr=[row["deviation"]],
            color=color,
            marker=marker,
            capsize=3,
            markersize=6,
        )
        points[name] = labels.Named(row["state_mb"], row["ratio"], color)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlim=(0.9, 90), ylim=(0.985, 1.1))
    for name, color, marker in (("this package", OURS, "o"), ("others", PEER, "s")):
        axes.plot([], [], color=color, marker=marker, linestyle="", label=name)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    axes.set_xlabel("optimizer state (MB, 3.2M parameters)")
    axes.set_title("Loss over float32 Muon's", fontsize=11)
    labels.label_points(axes, points)


def draw_step(axes, rows):
    """Draws the planned bytes of whole steps as bars of three parts."""
    parts = {
        "weights": ("0.55", ""),
        "state": (figures.COLORS[2], ""),
        "rest": ("0.85", "///"),
    }
    told = {"weights": "weights", "state": "optimizer state", "rest": "all else"}
    left = [0.0] * len(rows)
    for part, (color, hatch) in parts.items():
        sizes = [row[part] / 1e6 for row in rows.values()]
        axes.barh(
            [*rows],
            sizes,
            left=left,
            color=color,
            hatch=hatch,
            edgecolor="white",
            label=told[part],
        )
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for row, total in enumerate(left):
        axes.text(total + 40, row, f"{total:,.0f}", va="center", fontsize=9)
    for name in axes.get_yticklabels():
        name.set_color(PEER if "optax" in name.get_text() else OURS)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("MB at the peak (125M parameters, 256 tokens)")
    axes.set_title("Memory of a whole training step", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def draw(numbers):
    """Returns the figure."""
    figure = Figure(figsize=(9.6, 3.9), layout="constrained", facecolor="white")
    loss, step = figure.subplots(1, 2, width_ratios=(1.15, 1))
    for axes in (loss, step):
        axes.grid(alpha=0.3, axis="both" if axes is loss else "x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    draw_step(step, numbers["step"]["bytes"])
    draw_loss(loss, numbers["loss"]["rows"])
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="compile the steps anew")
    if parser.parse_args().plan:
        plan()
    figures.save(draw(json.loads(NUMBERS.read_text())), OUTPUT, dpi=130)
    print(f"Wrote {OUTPUT}")


if __name__ == "__main__":
    main()
