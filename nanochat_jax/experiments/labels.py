"""Names beside what they name in a figure, so that no legend has to be searched."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = 9
_HEIGHT = 1.3 * _SIZE
_WIDTH = 0.6 * _SIZE

# Places of a name beside its point: horizontal and vertical offsets in points, and
# whether the name ends there.
_BESIDE = (
    (9, 0, False),
    (-9, 0, True),
    *(
        (6 * side, 12 * up, side < 0)
        for up in (1, -1, 2, -2, 3, -3)
        for side in (1, -1)
    ),
)


class Named(NamedTuple):
    """A point that gets a name.

    Attributes:
      x: Its place on the horizontal axis.
      y: Its place on the vertical axis.
      color: Color of the name.
    """

    x: float
    y: float
    color: Any


def label_ends(axes: "Axes", ends: Mapping[str, Named]) -> None:
    """Writes names to the right of the ends of lines, one below the other.

    Args:
      axes: Axes with the lines, and their final limits.
      ends: Ends of lines by name.
    """
    places = _in_points(axes, ends)
    names = sorted(places, key=lambda name: -places[name][1])
    heights = [_HEIGHT * (1 + _text(name).count("\n")) for name in names]
    extent = axes.get_window_extent()
    bottom, top = (edge * 72 / axes.figure.dpi for edge in (extent.y0, extent.y1))
    wanted = [min(max(places[name][1], bottom), top) for name in names]
    middles = _apart(wanted, heights, bottom)
    right = max((x for x, _ in places.values()), default=0.0)
    for name, middle in zip(names, middles, strict=True):
        x, y = places[name]
        offset, seen = (right - x + 14, middle - y), bottom <= y <= top
        _write(axes, name, ends[name], offset, leader=seen)


def label_points(axes: "Axes", points: Mapping[str, Named]) -> None:
    """Writes names beside points, where no other name or point is.

    Args:
      axes: Axes with the points, and their final limits.
      points: Points by name.
    """
    places = _in_points(axes, points)
    # Room for the error bar of a point, too.
    taken = [_box(x - 5, y - 12, 10, 24) for x, y in places.values()]
    extent, scale = axes.get_window_extent(), 72 / axes.figure.dpi
    left, right = extent.x0 * scale, extent.x1 * scale
    bottom, top = extent.y0 * scale, extent.y1 * scale
    for name, (x, y) in places.items():
        lines = _text(name).split("\n")
        long, high = _WIDTH * max(map(len, lines)), _HEIGHT * len(lines)
        boxes = {
            place: _box(
                x + place[0] - long * place[2], y + place[1] - high / 2, long, high
            )
            for place in _BESIDE
        }
        free = [
            place
            for place, box in boxes.items()
            if left <= box[0] <= box[2] <= right
            and bottom <= box[1] <= box[3] <= top
            and not any(_overlap(box, other) for other in taken)
        ]
        chosen = free[0] if free else _BESIDE[0]
        taken.append(boxes[chosen])
        _write(axes, name, points[name], chosen[:2], ends_there=chosen[2])


def _text(name: str) -> str:
    """Returns the name of a variant with its settings on lines of their own."""
    return re.sub("([:,]) ?", r"\1\n", name)


def _apart(
    wanted: Sequence[float], heights: Sequence[float], bottom: float
) -> list[float]:
    """Returns places for texts near those wanted, from the top, without overlap.

    Args:
      wanted: Middles of the texts, the highest first.
      heights: Their heights.
      bottom: Place below which there is no text, unless there is no room above.
    """
    places: list[float] = []
    for y, height in zip(wanted, heights, strict=True):
        above = places[-1] - (heights[len(places) - 1] + height) / 2 if places else y
        places.append(min(y, above))
    below = bottom
    for i in reversed(range(len(places))):
        places[i] = max(places[i], below + heights[i] / 2)
        below = places[i] + heights[i] / 2
    return places


def _write(
    axes: "Axes",
    name: str,
    point: Named,
    offset: tuple[float, float],
    *,
    leader: bool = False,
    ends_there: bool = False,
) -> None:
    line = {
        "arrowstyle": "-",
        "color": point.color,
        "lw": 0.6,
        "relpos": (0, 0.5),
        "shrinkB": 3,
    }
    axes.annotate(
        _text(name),
        (point.x, point.y),
        xytext=offset,
        textcoords="offset points",
        color=point.color,
        fontsize=_SIZE,
        ha="right" if ends_there else "left",
        va="center",
        annotation_clip=False,
        arrowprops=line if leader else None,
    )


def _in_points(
    axes: "Axes", named: Mapping[str, Named]
) -> dict[str, tuple[float, float]]:
    """Returns places on the figure, in points, which is laid out for that."""
    axes.figure.draw_without_rendering()  # pyright: ignore[reportAttributeAccessIssue]
    scale = 72 / axes.figure.dpi
    places = {
        name: axes.transData.transform((point.x, point.y)) * scale
        for name, point in named.items()
    }
    return {name: (float(x), float(y)) for name, (x, y) in places.items()}


def _box(x: float, y: float, width: float, height: float) -> tuple[float, ...]:
    return x, y, x + width, y + height


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Returns whether two boxes, of left, bottom, right and top, overlap."""
    return all(
        one[low] < other[high] and other[low] < one[high]
        for low, high in ((0, 2), (1, 3))
    )
