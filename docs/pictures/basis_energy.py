"""Draws how much of real gradients a low-rank basis keeps, by its rank and its age.

Run it with `python docs/pictures/basis_energy.py`, in half a minute.
"""

from pathlib import Path

import draw
import numpy as np
from matplotlib.axes import Axes
from tiny_gpt import gradients

from nanochat_jax.numerics import range_basis

RANKS = (4, 8, 16, 32, 64, 128)
AGED = {8: draw.GREEN, 16: draw.ORANGE, 32: draw.BLUE, 64: draw.RED}
START = 40  # step of the gradient from which the ageing bases are computed


def energy(basis: np.ndarray, gradient: np.ndarray) -> float:
    """Returns the captured energy, `‖PᵀG‖² / ‖G‖²`.

    Args:
      basis: Matrix `P` with orthonormal columns.
      gradient: Matrix `G` with as many rows.
    """
    return float(np.sum((basis.T @ gradient) ** 2) / np.sum(gradient**2))


def main(folder: Path = draw.FOLDER) -> dict[str, dict]:
    """Draws the picture, and returns its numbers.

    Args:
      folder: Folder to write to.

    Returns:
      Captured energy by matrix and rank; and, as `"aged"`, by rank and steps since the
      basis was computed.
    """
    grads = gradients()
    find = lambda gradient, rank: np.asarray(range_basis(gradient, rank, 0))
    kept = {
        name: {rank: energy(find(g[-1], rank), g[-1]) for rank in RANKS}
        for name, g in grads.items()
    }
    later = grads["feed-forward, up"][START:]
    bases = {rank: find(later[0], rank) for rank in AGED}
    aged = {rank: [energy(basis, g) for g in later] for rank, basis in bases.items()}
    figure, (by_rank, by_age) = draw.panels(2)
    _draw_ranks(by_rank, kept)
    _draw_ages(by_age, aged)
    draw.save(figure, "basis_energy", folder)
    return kept | {"aged": aged}


def _draw_ranks(axes: Axes, kept: dict[str, dict[int, float]]) -> None:
    styles = {
        "attention, value": (draw.RED, "o", (0, 18)),
        "feed-forward, up": (draw.BLUE, "s", (36, -16)),
    }
    for name, by_rank in kept.items():
        color, marker, shift = styles[name]
        energies = [100 * energy for energy in by_rank.values()]
        axes.plot(RANKS, energies, color=color, marker=marker)
        draw.label(axes, name, RANKS[1], energies[1], color, shift, "center")
    axes.set(title="Energy of a gradient, by rank", xlabel="rank, of 128")
    axes.set(ylabel="captured energy, %", ylim=(0, 108), xscale="log")
    axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
    axes.minorticks_off()


def _draw_ages(axes: Axes, aged: dict[int, list[float]]) -> None:
    ends = {}
    for rank, energies in aged.items():
        means = 100 * np.convolve(energies, np.ones(5) / 5, "valid")
        ages = np.arange(len(means))
        axes.plot(ages, means, color=AGED[rank], linewidth=1.5)
        ends[f"rank {rank}"] = ages[-1], means[-1], AGED[rank]
    axes.set(title="Energy of later gradients, feed-forward")
    axes.set(xlabel="steps since the basis was computed, mean of five", ylim=(0, 108))
    axes.set_xlim(0, 1.28 * ages[-1])
    draw.label_ends(axes, ends)


if __name__ == "__main__":
    results = main()
    aged = results.pop("aged")
    print("rank" + " " * 12 + "".join(f"{rank:8}" for rank in RANKS))
    for name, by_rank in results.items():
        print(f"{name:16}" + "".join(f"{100 * x:6.1f} %" for x in by_rank.values()))
    print("steps since       0    5 to 9   last ten")
    for rank, energies in aged.items():
        parts = energies[:1], energies[5:10], energies[-10:]
        shown = "".join(f"{100 * np.mean(part):8.1f} %" for part in parts)
        print(f"rank {rank:3}" + shown)
