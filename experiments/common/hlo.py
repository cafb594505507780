"""The text of a compiled program: computations, instructions, arrays."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_COMMENT = re.compile(r"/\*.*?\*/")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(?.*\{$")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.*)")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)"
)
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^{}]*\})?")
_OPERAND = re.compile(r"%?([A-Za-z_][\w.\-]*)\s*(?:,|$)")
_STRUCTURE = ("while", "call", "async-start")
# Memory of another kind, such as a TPU's VMEM, has a space in its layout.
_ELSEWHERE = re.compile(r"S\([1-9]\d*\)")


class Array(NamedTuple):
    """One array in a type.

    Attributes:
        dtype: as XLA writes it, such as "f32".
        shape: its sizes.
        nbytes: its bytes.
        in_hbm: whether it is in the device's main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    in_hbm: bool


class Instruction(NamedTuple):
    """One instruction of a computation.

    Attributes:
        name: unique within its computation.
        is_root: whether it is the computation's result.
        type: its result's type, as text.
        opcode: such as "fusion".
        operands: names of instructions.
        inner: the text between its parentheses.
        attributes: the text after these.
    """

    name: str
    is_root: bool
    type: str
    opcode: str
    operands: tuple[str, ...]
    inner: str
    attributes: str

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of its result."""
        return arrays(self.type)

    @property
    def nbytes(self) -> int:
        """Bytes of its result in the device's main memory."""
        return sum(each.nbytes for each in self.arrays if each.in_hbm)

    @property
    def called(self) -> list[str]:
        """Computations that it calls, branches apart."""
        return _CALLS.findall(self.attributes)

    @property
    def branches(self) -> list[str]:
        """Computations of which it calls one."""
        found = _BRANCHES.findall(self.attributes)
        return [x.strip(" %") for pair in found for x in ",".join(pair).split(",") if x]


class Place(NamedTuple):
    """One execution site of an instruction.

    Attributes:
        instruction: the instruction.
        body: all instructions of its computation, by name.
        computation: the computation's name.
        times: number of executions, by the loops around it.
        conditional: the outermost conditional around it, or empty.
        branch: the branch of `conditional` that contains it, or empty.
    """

    instruction: Instruction
    body: Mapping[str, Instruction]
    computation: str
    times: int
    conditional: str
    branch: str


class Program(NamedTuple):
    """A compiled program.

    Attributes:
        computations: instructions by name, for each computation by name.
        entry: name of the first computation.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def trips(self, loop: Instruction) -> int:
        """Iterations of a loop; 0 if the compiler does not know them."""
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        # A counting loop compares with the one integer of its condition.
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        found, queue = set(), [condition[1]] if condition else []
        while queue:
            for each in self.computations.get(queue.pop(), {}).values():
                if each.opcode == "constant" and each.type.startswith("s32[]"):
                    found.add(int(each.inner))
                queue += each.called
        return found.pop() if len(found) == 1 else 0

    def walk(self, fusions: bool) -> Iterator[Place]:
        """Yields every executed instruction, in all branches of conditionals.

        A loop of unknown length is a conditional, and one iteration its branch.

        Args:
            fusions: whether to enter fusions and other computations within a kernel.
        """
        return self._walk(self.entry, 1, "", "", fusions)

    def _walk(
        self, name: str, times: int, conditional: str, branch: str, fusions: bool
    ) -> Iterator[Place]:
        body = self.computations.get(name, {})
        for each in body.values():
            yield Place(each, body, name, times, conditional, branch)
            for called in each.branches:
                inside = (conditional or each.name, branch or called)
                yield from self._walk(called, times, *inside, fusions)
            if fusions or each.opcode in _STRUCTURE:
                trips = self.trips(each) if each.opcode == "while" else 1
                inside = conditional, branch
                if not trips:
                    inside = conditional or each.name, branch or each.name
                for called in each.called:
                    inner = times * max(trips, 1), *inside, fusions
                    yield from self._walk(called, *inner)


def parse(text: str) -> Program:
    """Reads a program.

    Args:
        text: `compiled.as_text()`.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, body = "", {}
    for line in _COMMENT.sub("", text).splitlines():
        if not line.startswith(" ") and (found := _COMPUTATION.match(line)):
            body = computations.setdefault(found[2], {})
            entry = found[2] if found[1] else entry
        elif read := _instruction(line):
            body[read.name] = read
    return Program(computations, entry)


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type: of "(f32[2,3], s32[])" two."""
    return tuple(_arrays(text))


def _arrays(text: str) -> Iterator[Array]:
    for dtype, bits, dims, layout in _ARRAY.findall(text):
        shape = tuple(int(n) for n in dims.split(",") if n)
        nbytes = -(-math.prod(shape) * int(bits or 8) // 8)
        yield Array(dtype, shape, nbytes, not _ELSEWHERE.search(layout))


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if found is None:
        return None
    root, name, text = found.groups()
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    kind, text = text[:end], text[end:].lstrip()
    start = text.find("(")
    if start < 0:
        return None
    stop = _closing(text, start)
    inner = text[start + 1 : stop]
    names = tuple(_OPERAND.findall(inner))
    return Instruction(
        name, bool(root), kind, text[:start], names, inner, text[stop + 1 :]
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` is closed."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)
