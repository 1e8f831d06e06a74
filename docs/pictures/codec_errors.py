"""Draws the error of codecs by the distribution of values, and two ways to round.

Run it with `python docs/pictures/codec_errors.py`, in some seconds.
"""

from pathlib import Path

import draw
import jax
import jax.numpy as jnp
import numpy as np

import nanochat_jax as nj

CODECS = {
    "Int8": (nj.Int8(), draw.BLUE),
    "Dynamic8": (nj.Dynamic8(), draw.GREEN),
    "Normal4": (nj.Normal4(), draw.RED),
    "Int4": (nj.Int4(), draw.ORANGE),
    "Normal2": (nj.Normal2(), draw.PURPLE),
}
ROUNDINGS = 4096


def distributions() -> dict[str, jax.Array]:
    """Returns 256 rows of 1,024 values of each distribution, by its name."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (256, 1024)
    normal = jax.random.normal(keys[0], shape)
    columns = jnp.exp(1.5 * jax.random.normal(keys[1], (1, 1024)))
    decades = 10 ** jax.random.uniform(keys[3], shape, minval=-6, maxval=0)
    return {
        "normal": normal,
        "heavy tails\n(Student's t, 3)": jax.random.t(keys[2], 3.0, shape),
        "columns of\nmixed size": normal * columns,
        "over six\ndecades": normal * decades,
    }


def norm_error(stored: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `‖stored - x‖ / ‖x‖`.

    Args:
      stored: Decoded values.
      x: Values before they were stored.
    """
    return jnp.linalg.norm(stored - x) / jnp.linalg.norm(x)


def entry_error(stored: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the mean of `|stored - x| / |x|` over entries, each counted as 1 at most.

    Args:
      stored: Decoded values.
      x: Values before they were stored.
    """
    return jnp.mean(jnp.minimum(jnp.abs(stored - x) / jnp.abs(x), 1.0))


def rounded_means(xs: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the mean stored value under each kind of rounding, in gaps of levels.

    Args:
      xs: Values, in gaps between the levels of `Int8`.
    """
    # The last entry of a row is 127, so that the gap between two levels is 1.
    rows = jnp.stack([jnp.asarray([x, 127.0], jnp.float32) for x in xs])
    by_chance = nj.Int8(stochastic_rounding=True)
    decode = jax.vmap(lambda key: by_chance.encode(rows, key).decode()[:, 0])
    keys = jax.random.split(jax.random.key(1), ROUNDINGS)
    nearest = nj.Int8().encode(rows).decode()[:, 0]
    return {
        "to nearest": np.asarray(nearest),
        "stochastic": np.asarray(decode(keys).mean(0)),
    }


def main(folder: Path = draw.FOLDER) -> dict[str, dict]:
    """Draws both pictures, and returns their numbers.

    Args:
      folder: Folder to write to.

    Returns:
      Errors by measure, codec and distribution, and the largest bias of each rounding.
    """
    arrays = distributions()
    decoded = {
        codec: {name: CODECS[codec][0].encode(x).decode() for name, x in arrays.items()}
        for codec in CODECS
    }
    measures = {"of the array": norm_error, "of each entry, mean": entry_error}
    errors = {
        measure: {
            codec: {name: float(of(stored[name], x)) for name, x in arrays.items()}
            for codec, stored in decoded.items()
        }
        for measure, of in measures.items()
    }
    _draw_errors(errors, list(arrays), folder)
    xs = np.linspace(-1, 2, 61)
    means = rounded_means(xs)
    _draw_rounding(xs, means, folder)
    bias = {name: float(np.abs(mean - xs).max()) for name, mean in means.items()}
    return errors | {"largest bias": bias}


def _draw_errors(errors: dict, names: list[str], folder: Path) -> None:
    figure, panels = draw.panels(2, width=5.2)
    places = np.arange(len(names))
    for axes, (measure, by_codec) in zip(panels, errors.items(), strict=True):
        ends = {}
        for marker, (codec, by_name) in zip(
            draw.MARKERS, by_codec.items(), strict=False
        ):
            color, line = CODECS[codec][1], [100 * by_name[name] for name in names]
            axes.semilogy(places, line, color=color, marker=marker, linewidth=1)
            ends[codec] = places[-1], line[-1], color
        axes.set(title=f"Error {measure}", ylim=(0.4, 300))
        axes.set_xlim(-0.3, len(names) - 0.2)
        axes.set_xticks(places, names, fontsize=8)
        axes.set_yticks([1, 10, 100], ["1 %", "10 %", "100 %"])
        draw.label_ends(axes, ends)
    draw.save(figure, "codec_errors", folder)


def _draw_rounding(xs: np.ndarray, means: dict[str, np.ndarray], folder: Path) -> None:
    figure, [axes] = draw.panels(1, width=5.2)
    steps = {"linewidth": 2, "drawstyle": "steps-mid"}
    axes.plot(xs, means["to nearest"], color=draw.ORANGE, **steps)
    axes.plot(
        xs, means["stochastic"], color=draw.BLUE, marker="o", markersize=3.5, lw=0
    )
    draw.label(axes, "to nearest", 1.0, 1.0, draw.ORANGE, (10, -14))
    stochastic = f"stochastic, mean of {ROUNDINGS:,}"
    draw.label(axes, stochastic, 0.44, 0.72, draw.BLUE, (0, 0), "right")
    axes.set(xlabel="value, in gaps between levels", ylabel="mean stored value")
    axes.set(title="Stochastic rounding is right on average")
    draw.save(figure, "rounding", folder)


if __name__ == "__main__":
    results = main()
    bias = results.pop("largest bias")
    for measure, by_codec in results.items():
        print(f"error {measure}")
        for codec, by_name in by_codec.items():
            cells = [f"{100 * error:7.2f} %" for error in by_name.values()]
            print(f"{codec:10}" + "".join(cells))
    print("largest bias of a value, in gaps between levels")
    for rounding, gap in bias.items():
        print(f"{rounding:10} {gap:.2f}")
