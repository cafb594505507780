"""The collectives of a compiled program, from its optimized text."""

import itertools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from experiments.common import hlo

_KINDS = {
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
}
_CHANNEL = re.compile(r"channel_id=\d+")


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
    found: list[Collective] = []
    seen: dict[tuple[Any, ...], str] = {}
    for place in hlo.parse(text).walk(fusions=True):
        each = place.instruction
        # An asynchronous one counts where it ends: its result is the received array.
        kind = each.opcode.removesuffix("-done")
        if kind not in _KINDS:
            continue
        known = [place.body[x].arrays for x in each.operands if x in place.body]
        operands = tuple(itertools.chain.from_iterable(known))
        sent = max(each.arrays, operands, key=_nbytes)
        shapes, sizes = tuple(x.shape for x in sent), tuple(x.nbytes for x in sent)
        # One that overlaps with kernels stands in the first, the last, and in between.
        channel = _CHANNEL.search(each.attributes)
        once = (
            channel[0] if channel else place.computation,
            kind,
            shapes,
            place.branch,
        )
        if seen.setdefault(once, place.computation) == place.computation:
            optional = bool(place.branch)
            found += [Collective(kind, shapes, sizes, optional)] * place.times
    return found


def _nbytes(arrays: Iterable[hlo.Array]) -> int:
    return sum(each.nbytes for each in arrays)


def total(sent: Iterable[Collective]) -> int:
    """Returns the bytes of all of them."""
    return sum(sum(each.sizes) for each in sent)
