"""Collectives of a compiled program, read from its HLO text.

Sizes are bytes of the buffers on one device.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
"""Kinds of collectives, by their names in HLO."""

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^(?:ROOT )?%?[\w.\-]+ = (?P<result>.*?) (?P<kind>"
    + "|".join(KINDS)
    + r")(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")
_LOOPS = ("body", "condition")
_BRANCHES = ("branch_computations", "true_computation", "false_computation")
_CALLED = re.compile(
    r"\b(body|condition|to_apply|calls|branch_computations|true_computation"
    r"|false_computation)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation by which devices send each other data.

    Attributes:
      kind: One of `KINDS`.
      bytes: Bytes of its operand or of its result on one device, whichever is larger.
      devices: Number of devices that take part in it together.
      in_loop: Whether it is in a loop, and so runs any number of times.
      in_branch: Whether it is in a branch, and so may not run.
    """

    kind: str
    bytes: int
    devices: int
    in_loop: bool
    in_branch: bool = False

    @property
    def sent_bytes(self) -> int:
        """Bytes that one device sends."""
        return sent_bytes(self.kind, self.bytes, self.devices)


def sent_bytes(kind: str, size: int, devices: int) -> int:
    """Returns the bytes that one device sends, in a ring or directly.

    Args:
      kind: One of `KINDS`.
      size: Bytes of the operand or result on one device, whichever is larger.
      devices: Number of devices that take part.
    """
    if kind == "collective-permute":
        return size
    sent = size * (devices - 1) // devices
    return 2 * sent if kind == "all-reduce" else sent


def collectives(hlo: str) -> list[Collective]:
    """Returns the collectives of a compiled program.

    Example:
      >>> double = jax.jit(lambda x: 2 * x).lower(jnp.ones(3)).compile()
      >>> collectives(double.as_text())
      []

    Args:
      hlo: Its text, `compiled.as_text()`.
    """
    bodies = dict(_computations(hlo))
    looped, branched = (
        _reachable(bodies, _called_by(bodies, bodies, roles))
        for roles in (_LOOPS, _BRANCHES)
    )
    return [
        found
        for name, lines in bodies.items()
        for line in lines
        if (found := _collective(line, name in looped, name in branched)) is not None
    ]


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    """Yields the name and the instructions of each computation."""
    name, lines = "", []
    for line in hlo.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            name, lines = start[1], []
        elif line == "}":
            yield name, lines
        else:
            lines.append(line.strip())


def _called_by(
    bodies: dict[str, list[str]], names: Sequence[str] | dict, roles: Sequence[str] = ()
) -> set[str]:
    """Returns the computations called by `names`, in these roles or any."""
    return {
        called.lstrip("%")
        for name in names
        for line in bodies.get(name, ())
        for role, list_of_names in _CALLED.findall(line)
        if not roles or role in roles
        for called in re.split(", ?", list_of_names)
    }


def _reachable(bodies: dict[str, list[str]], start: set[str]) -> set[str]:
    found, new = set(start), set(start)
    while new:
        new = _called_by(bodies, [*new]) - found
        found |= new
    return found


def _collective(line: str, in_loop: bool, in_branch: bool) -> Collective | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    kind, devices = match["kind"], _group_size(line)
    sizes = [_bytes(array) for array in _ARRAY.findall(match["result"])]
    # A `-start` instruction returns its operands too, before its results.
    if match["start"] and kind != "all-reduce":
        sizes = sizes[len(sizes) // 2 :]
    size = sum(sizes) * (devices if kind == "reduce-scatter" else 1)
    return Collective(kind, size, devices, in_loop, in_branch)


def _bytes(array: tuple[str, str, str]) -> int:
    _, bits, shape = array
    entries = math.prod(int(size) for size in shape.split(",") if size)
    return entries * max(8, int(bits or 8)) // 8


def _group_size(line: str) -> int:
    """Returns how many devices take part, from any of the ways to write groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    if by_axis := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", by_axis[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", by_axis[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if "source_target_pairs" in line:
        return 2  # a permutation sends from one device to one other
    raise ValueError(f"these groups of devices cannot be read: {line}")
