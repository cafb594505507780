"""What the kernels of a compiled program read, write and multiply."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from experiments.common.hlo import Instruction, Program, parse

# They move nothing: names for arrays, and the ends of what counted at its start.
_FREE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "domain",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_SLICES = {"slice", "dynamic-slice", "gather"}
_SAME = {"bitcast", "reshape", "copy"}
_PRECISION = re.compile(r"operand_precision=\{(\w+),(\w+)\}")
_LABELS = re.compile(r"dim_labels=\w+_(\w+)->")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_GEMM = re.compile(r'"lhs_contracting_dimensions":\[([\d",]*)\]')
_RANKS = ("default", "high", "highest")


class Kernel(NamedTuple):
    """One kernel, or one of its iterations together.

    Attributes:
        name: of its instruction.
        nbytes: read from and written to the device's main memory.
        flops: of its matrix products.
        precision: of these: "default", "high" or "highest"; "bfloat16" or "float32"
            says what they multiply.
        branch: the computation that runs it if it is one of several, or empty.
    """

    name: str
    nbytes: float
    flops: float
    precision: str
    branch: str


def kernels(text: str) -> list[Kernel]:
    """Returns what a program runs; a loop's kernels once for all of its iterations.

    A kernel reads its operands and writes its results. Of what it reads through slices
    and gathers alone it reads these; what it updates in place costs the update, read
    and written. Memory on the chip costs nothing. A loop of unknown length counts once.

    Args:
        text: `compiled.as_text()`.
    """
    program = parse(text)
    return list(_run(program, program.entry, 1, ""))


def _run(program: Program, name: str, times: int, branch: str) -> Iterator[Kernel]:
    body = program.computations.get(name, {})
    for each in body.values():
        if each.opcode in _FREE or each.opcode.endswith("-done"):
            continue
        if each.branches:
            for called in each.branches:
                yield from _run(program, called, times, branch or called)
        elif each.opcode == "while":
            trips = times * _trips(program, each)
            for called in each.called:
                yield from _run(program, called, trips, branch)
        elif each.opcode in ("call", "async-start"):
            for called in each.called:
                yield from _run(program, called, times, branch)
        else:
            flops, precision = _products(program, each, body)
            moved = _moved(program, each, body)
            yield Kernel(each.name, times * moved, times * flops, precision, branch)


def _trips(program: Program, loop: Instruction) -> int:
    if loop.trips is not None:
        return loop.trips
    # A counting loop compares with the one integer of its condition.
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    found, queue = set(), [condition[1]] if condition else []
    while queue:
        for each in program.computations.get(queue.pop(), {}).values():
            if each.opcode == "constant" and each.type.startswith("s32[]"):
                found.add(int(each.inner))
            queue += each.called
    return found.pop() if len(found) == 1 else 1


def _moved(program: Program, each: Instruction, body: dict[str, Instruction]) -> float:
    """Bytes that one kernel reads and writes."""
    known = [body[name] for name in each.operands if name in body]
    if each.opcode == "fusion":
        return _fused(program, each, body)
    if each.opcode in _SLICES:
        return 2 * each.nbytes
    if each.opcode == "dynamic-update-slice":
        return 2 * body[each.operands[1]].nbytes
    if each.opcode == "slice-start":
        # The operand, then the slice; either may be on the chip.
        operand, part = each.arrays[:2]
        return part.nbytes * (operand.in_hbm + part.in_hbm)
    if each.opcode.endswith("-start"):
        # Its result names its operands again.
        return each.nbytes
    return each.nbytes + sum(operand.nbytes for operand in known)


def _fused(program: Program, each: Instruction, outer: dict[str, Instruction]) -> float:
    body = program.computations[each.called[0]]
    parameters = {
        int(x.inner): x.name for x in body.values() if x.opcode == "parameter"
    }

    def source(name: str) -> str:
        while body[name].opcode in _SAME and len(body[name].operands) == 1:
            name = body[name].operands[0]
        return name

    readers: dict[str, list[Instruction]] = {}
    for x in body.values():
        if x.opcode in _SAME and len(x.operands) == 1 and not x.is_root:
            continue
        for operand in x.operands:
            if operand in body:
                readers.setdefault(source(operand), []).append(x)
    written, in_place = each.nbytes, set()
    for x in body.values():
        if x.opcode != "dynamic-update-slice" or x.nbytes > written:
            continue
        target = source(x.operands[0])
        if target in parameters.values():
            written += 2 * body[x.operands[1]].nbytes - x.nbytes
            in_place.add(target)
    read = 0.0
    for i, operand in enumerate(each.operands):
        if operand not in outer or (name := parameters.get(i)) in in_place:
            continue
        full = outer[operand].nbytes
        users = readers.get(name, []) if name else []
        if users and all(
            x.opcode in _SLICES and source(x.operands[0]) == name for x in users
        ):
            full = min(full, sum(x.nbytes for x in users))
        read += full
    return written + read


def _products(
    program: Program, each: Instruction, body: dict[str, Instruction]
) -> tuple[float, str]:
    """Floating-point operations of a kernel's products, and how they are computed."""
    inner = [each] if each.opcode != "fusion" else []
    scopes = {each.name: body}
    for called in each.called if each.opcode == "fusion" else ():
        for x in program.computations.get(called, {}).values():
            inner.append(x)
            scopes[x.name] = program.computations[called]
            if x.opcode == "fusion":
                flops, precision = _products(program, x, program.computations[called])
                if flops:
                    return flops, precision
    for x in inner:
        if x.opcode not in ("convolution", "dot", "custom-call"):
            continue
        scope = scopes[x.name]
        operands = [scope[name].arrays for name in x.operands[:2] if name in scope]
        if len(operands) < 2 or not all(operands):
            continue
        left, right = operands[0][0], operands[1][0]
        if depth := _depth(x, left.shape, right.shape):
            given = _PRECISION.search(x.attributes)
            precision = max(given.groups() if given else ("default",), key=_RANKS.index)
            kind = "bfloat16" if left.dtype == right.dtype == "bf16" else precision
            return 2.0 * math.prod(x.arrays[0].shape) * depth, kind
    return 0.0, ""


def _depth(x: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """How many products each element of a product sums up; 0 if it is none."""
    if x.opcode == "convolution":
        labels = _LABELS.search(x.attributes)
        return math.prod(right) // right[labels[1].index("o")] if labels else 0
    given = (_CONTRACTED if x.opcode == "dot" else _GEMM).search(x.attributes + x.inner)
    if given is None:
        return 0
    return math.prod(left[int(i)] for i in re.findall(r"\d+", given[1]))
