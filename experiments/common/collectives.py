"""The collectives of a compiled program, from its optimized text."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)")
# An asynchronous one counts where it ends: there its result is the received array.
_COLLECTIVE = re.compile(rf"(.*?) ({_KINDS})(?:-done)?\(([^)]*)\)")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)"
)
_COMMENT = re.compile(r"/\*.*?\*/")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b[a-z]+(\d*)\w*\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
        kind: as XLA writes it, such as "all-gather".
        shapes: of its operands or its results on one device, whichever are larger: the
            gathered array, the array that is scattered.
        sizes: their bytes.
        optional: whether it is in a branch of a conditional.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    optional: bool


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a program, all branches of conditionals included.

    Those of a loop count once for each iteration, or once if the compiler does not know
    their number.

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
            names = [x.strip(" %") for x in sent[3].split(",")]
            operands = " ".join(body.get(x, "").split(" ")[0] for x in names)
            arrays = max(_arrays(sent[1]), _arrays(operands), key=lambda x: sum(x[1]))
            found.append(Collective(sent[2], *arrays, optional))
        trips = int((_TRIPS.search(text) or [0, 1])[1])
        for called in _CALLS.findall(text):
            found += _inside(bodies, called, optional) * trips
        for branches in _BRANCHES.findall(text):
            for called in ",".join(branches).split(","):
                found += _inside(bodies, called.strip(" %"), True)
    return found


def total(sent: Iterable[Collective]) -> int:
    """Returns the bytes of all of them."""
    return sum(sum(each.sizes) for each in sent)


def _arrays(text: str) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Shapes and bytes of each array of a type: (2, 3) and 24 of "f32[2,3]"."""
    found = [
        (tuple(int(n) for n in dims.split(",") if n), int(bits or 8))
        for bits, dims in _ARRAY.findall(text)
    ]
    shapes = tuple(shape for shape, _ in found)
    return shapes, tuple(math.prod(shape) * bits // 8 for shape, bits in found)
