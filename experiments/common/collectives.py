"""What devices send one another in a compiled program, from its optimized text."""

import math
import re
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)")
# Of an asynchronous one, the end: its result is the received array alone.
_COLLECTIVE = re.compile(rf"(.*?) ({_KINDS})(?:-done)?\(([^)]*)\)")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)"
)
_COMMENT = re.compile(r"/\*.*?\*/")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b[a-z]+(\d*)\w*\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a program on each device.

    Attributes:
        kind: as XLA writes it, such as "all-gather".
        bytes: of all arrays, as large as they are on one device before or after it,
            whichever is larger: the gathered array, the array that is scattered.
        largest: bytes of the largest of these arrays.
        optional: whether it is in a branch of a conditional.
    """

    kind: str
    bytes: int
    largest: int
    optional: bool


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a program; those of a loop as often as it runs.

    A loop counts once if the compiler does not know how often it runs. Of a
    conditional, the branch that sends most.

    Args:
        text: `compiled.as_text()`.
    """
    bodies: dict[str, dict[str, str]] = {}
    entry, body = "", {}
    for line in _COMMENT.sub("", text).splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            body = bodies.setdefault(name, {})
            entry = name if line.startswith("ENTRY ") else entry
        elif found := _INSTRUCTION.match(line):
            body[found[1]] = found[2]
    return _inside(bodies, entry, False)


def _inside(
    bodies: dict[str, dict[str, str]], name: str, optional: bool
) -> list[Collective]:
    found: list[Collective] = []
    body = bodies.get(name, {})
    for text in body.values():
        if sent := _COLLECTIVE.match(text):
            operands = [body.get(x.strip(" %"), "") for x in sent[3].split(",")]
            received = _sizes(sent[1])
            given = [y for x in operands for y in _sizes(x.split(" ")[0])]
            sizes = max(received, given, key=sum)
            found.append(Collective(sent[2], sum(sizes), max(sizes), optional))
        trips = int((_TRIPS.search(text) or [0, 1])[1])
        for called in _CALLS.findall(text):
            found += _inside(bodies, called, optional) * trips
        names = [x for pair in _BRANCHES.findall(text) for x in pair if x]
        names = [x.strip(" %") for each in names for x in each.split(",")]
        branches = [_inside(bodies, each, True) for each in names]
        found += max(branches, key=total, default=[])
    return found


def total(sent: list[Collective]) -> int:
    """Returns the bytes of all of them."""
    return sum(each.bytes for each in sent)


def _sizes(shape: str) -> list[int]:
    """Returns the bytes of each array of a type; of "(f32[2,3], s8[4])", 24 and 4."""
    return [
        int(bits or 8) * math.prod(int(n) for n in dims.split(",") if n) // 8
        for bits, dims in _ARRAY.findall(shape)
    ] or [0]
