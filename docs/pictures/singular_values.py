"""Draws the singular values of a momentum before and after Newton-Schulz.

Run it with `python docs/pictures/singular_values.py`, in half a minute.
"""

from pathlib import Path

import draw
import jax
import jax.numpy as jnp
import numpy as np
from tiny_gpt import gradients

import nanochat_jax as nj

SHOWN = {
    "quintic": ("5 steps", draw.BLUE),
    "polar_express_5": ("5 steps", draw.RED),
    "aol": ("4 steps", draw.GREEN),
    "polar_express_8": ("8 steps", draw.PURPLE),
}


def momentum_after(grads: np.ndarray) -> jax.Array:
    """Returns the update of `momentum` at the last of a run of gradients.

    Args:
      grads: Gradients, `[steps, fan_in, fan_out]`.
    """
    tx = nj.momentum(0.95)
    state, update = tx.init(jnp.asarray(grads[0])), jax.jit(tx.update)
    for grad in grads:
        momentum, state = update(jnp.asarray(grad), state)
    return momentum


def main(folder: Path = draw.FOLDER) -> dict[str, np.ndarray]:
    """Draws the picture, and returns the singular values.

    Args:
      folder: Folder to write to.

    Returns:
      Singular values, largest first, by the name of the polynomials, and `"before"`.
    """
    momentum = momentum_after(gradients()["feed-forward, up"])
    values_of = lambda x: np.linalg.svd(np.asarray(x), compute_uv=False)
    values = {"before": values_of(momentum / jnp.linalg.norm(momentum))}
    for name in SHOWN:
        values[name] = values_of(nj.newton_schulz(momentum, nj.POLYNOMIALS[name]))
    _draw(values, folder)
    return values


def _draw(values: dict[str, np.ndarray], folder: Path) -> None:
    figure, (left, right) = draw.panels(2)
    before = values["before"]
    places, ends = np.arange(1, len(before) + 1), {}
    left.semilogy(places, before, color=draw.ORANGE, linewidth=2)
    draw.label(left, "momentum", places[40], before[40], draw.ORANGE, (0, 14))
    left.set_title(f"Before: largest {before[0] / before[-1]:.0f} times the smallest")
    left.set_ylabel("singular value")
    for name, (steps, color) in SHOWN.items():
        right.plot(places, values[name], color=color, linewidth=2)
        ends[f"{name}, {steps}"] = places[-1], values[name][-1], color
    right.set(title="After Newton-Schulz: near one", ylim=(0, 1.35))
    right.set_xlim(right=places[-1] * 1.65)
    for axes in (left, right):
        axes.set_xlabel("place, largest first")
        axes.set_xticks([1, 32, 64, 96, 128])
    draw.label_ends(right, ends)
    draw.save(figure, "singular_values", folder)


if __name__ == "__main__":
    print(f"{'':16}   least   median  largest")
    for name, values in main().items():
        print(f"{name:16} {values[-1]:8.5f} {np.median(values):8.4f} {values[0]:8.4f}")
