"""Requests of a user to see one kernel as a batch of matrices."""

import fnmatch
from collections.abc import Mapping, Sequence

from nanochat_jax.interop.axes.declared import Declared
from nanochat_jax.transforms import MatrixAxes


class Requests:
    """Gates, heads and parts of named kernels that are to be a batch.

    Args:
      split: `True` for the gates that classes declare, or numbers of parts by pattern
        of the path.
      per_head: Whether attention heads are a batch.
    """

    def __init__(
        self, split: bool | Mapping[str, int] | None = None, per_head: bool = False
    ) -> None:
        self.gates = split is True
        self.patterns = dict(split) if isinstance(split, Mapping) else {}
        self.per_head = per_head
        self._met: set[str] = set()

    def axes(self, path: str, declared: Declared, kept: Sequence[int]) -> MatrixAxes:
        """Returns the axes of one matrix.

        Args:
          path: Path of the leaf, such as `"block/query/kernel"`.
          declared: Declaration of its class.
          kept: Where the axes that the class declares are in the leaf.
        """
        sides = list(declared.fan_in), list(declared.fan_out)
        parts: dict[int, int] = {}
        if self.gates and declared.gates:
            self._met.add("split=True")
            parts.update(declared.gates)
        if self.per_head and declared.heads:
            self._met.add("per_head=True")
            self._part_heads(declared, sides, parts)
        for pattern, number in self.patterns.items():
            if fnmatch.fnmatchcase(path, pattern):
                self._met.add(pattern)
                first = declared.fan_out[0]
                parts[first] = parts.get(first, 1) * number
        fan_in, fan_out = (tuple(kept[axis] for axis in side) for side in sides)
        split = {kept[axis]: number for axis, number in parts.items()}
        return MatrixAxes(fan_in, fan_out, split, source=declared.source)

    def _part_heads(
        self,
        declared: Declared,
        sides: tuple[list[int], list[int]],
        parts: dict[int, int],
    ) -> None:
        """Takes an axis of heads out of its side, or notes its parts."""
        assert declared.shape is not None
        for axis, heads in declared.heads.items():
            side = next(side for side in sides if axis in side)
            if declared.shape[axis] == heads and len(side) > 1:
                side.remove(axis)
            else:
                parts[axis] = heads

    def check(self, paths: Sequence[str]) -> None:
        """Raises a `ValueError` if a request has met no parameter.

        Args:
          paths: Paths of the matrices, for the message.
        """
        asked = [
            *(["split=True"] if self.gates else []),
            *(["per_head=True"] if self.per_head else []),
            *self.patterns,
        ]
        idle = [request for request in asked if request not in self._met]
        if idle:
            raise ValueError(
                f"{', '.join(idle)} fits no matrix of the model. `split=True` needs "
                "gates and `per_head=True` attention of a class that is known; "
                f"patterns are for these paths: {', '.join(paths) or 'none'}."
            )
