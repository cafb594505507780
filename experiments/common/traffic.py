"""What the kernels of a compiled program read, write and multiply."""

import collections
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from experiments.common.chips import Chip
from experiments.common.hlo import Instruction, Program, parse
from experiments.common.records import Row

# They move nothing themselves.
_FREE = {
    "add-dependency",
    "after-all",
    "async-start",
    "async-update",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "domain",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}
_SLICES = {"slice", "dynamic-slice", "gather"}
_SAME = {"bitcast", "reshape", "copy"}
_PRECISION = re.compile(r'operand_precision"?[=:][{\[]"?(\w+)"?,"?(\w+)')
_LABELS = re.compile(r"dim_labels=\w+_(\w+)->")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_GEMM = re.compile(r'"lhs_contracting_dimensions":\[([\d",]*)\]')
_COST = re.compile(r'"cost_estimate":{"flops":"(\d+)"')
_PRODUCTS = ("convolution", "dot", "custom-call")
_TF32 = "algorithm=dot_tf32_tf32_f32_x3"
_KINDS = ("bfloat16", "default", "high", "3 of TF32", "highest")


class Kernel(NamedTuple):
    """One kernel; all iterations together if it is in a loop.

    Attributes:
        name: of its instruction.
        nbytes: read from and written to the device's main memory.
        flops: of its matrix products.
        precision: of these: "default", "high" or "highest" for operands in float32,
            "3 of TF32" for these in three products of parts, "bfloat16" for others.
        conditional: the outermost conditional around it, or empty.
        branch: the branch of `conditional` that contains it, or empty.
    """

    name: str
    nbytes: float
    flops: float
    precision: str
    conditional: str
    branch: str


def kernels(text: str) -> list[Kernel]:
    """Returns the kernels of a program; those of a loop with all of its iterations.

    A kernel reads its operands and writes its results. An operand that is accessed only
    through slices or gathers counts as these. An update in place counts as a read and a
    write of the updated region. On-chip memory is free. A loop of unknown length is a
    conditional: it runs not at all, or once.

    Args:
        text: `compiled.as_text()`.
    """
    program = parse(text)
    return list(_kernels(program))


def account(text: str, chip: Chip) -> Row:
    """Returns what a step takes of a chip.

    Args:
        text: `compiled.as_text()`.
        chip: what it is compiled for.

    Returns:
        Bytes that kernels move in every `step`, in the cheapest branch of each
        conditional, and `besides` in the most expensive ones; floating-point operations
        of the step's products by precision (`flops`); a lower bound on the `seconds` of
        the step: for each kernel those of its memory or those of its products.
    """
    always, besides = split(kernels(text))
    return {
        "step": _nbytes(always),
        "besides": besides,
        "flops": _flops(always),
        "seconds": sum(
            chip.seconds(each.nbytes, each.flops, each.precision) for each in always
        ),
    }


def split(found: list[Kernel]) -> tuple[list[Kernel], float]:
    """Splits kernels into what every step runs and what some steps run besides.

    Args:
        found: of one program.

    Returns:
        The kernels outside of conditionals and those of the branch of each conditional
        that moves least; how many bytes more the branches move that move most.
    """
    always, besides = [each for each in found if not each.conditional], 0.0
    for name in {each.conditional for each in found} - {""}:
        branches = collections.defaultdict(list)
        for each in found:
            if each.conditional == name:
                branches[each.branch].append(each)
        ordered = sorted(branches.values(), key=_nbytes)
        always += ordered[0]
        besides += _nbytes(ordered[-1]) - _nbytes(ordered[0])
    return always, besides


def _nbytes(found: list[Kernel]) -> float:
    return sum(each.nbytes for each in found)


def _flops(found: list[Kernel]) -> dict[str, float]:
    total: dict[str, float] = collections.Counter()
    for each in found:
        if each.flops:
            total[each.precision] += each.flops
    return dict(total)


def _kernels(program: Program) -> Iterator[Kernel]:
    for each, body, _, times, conditional, branch in program.walk(fusions=False):
        for called in each.branches:
            # A branch that does nothing is one of them, too.
            inside = (conditional or each.name, branch or called)
            yield Kernel(each.name, 0.0, 0.0, "", *inside)
        if each.opcode == "while" and not program.trips(each):
            # No iteration is a branch that does nothing.
            yield Kernel(each.name, 0.0, 0.0, "", conditional or each.name, branch)
        if each.opcode in _FREE or each.opcode.endswith("-done"):
            continue
        flops, precision = _products(program, each, body)
        moved = _moved(program, each, body)
        yield Kernel(
            each.name, times * moved, times * flops, precision, conditional, branch
        )


def _moved(
    program: Program, each: Instruction, body: Mapping[str, Instruction]
) -> float:
    """Bytes that one kernel reads and writes."""
    known = [body[name] for name in each.operands if name in body]
    if each.opcode == "fusion":
        return _fused(program, each, body)
    if each.opcode in _SLICES:
        # It reads what it gives; either may be on the chip.
        return each.nbytes + _sliced(each) * any(x.nbytes for x in known[:1])
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


def _sliced(each: Instruction) -> int:
    return sum(x.nbytes for x in each.arrays)


def _fused(
    program: Program, each: Instruction, outer: Mapping[str, Instruction]
) -> float:
    body = program.computations[each.called[0]]
    parameters = _parameters(body)
    written, in_place = each.nbytes, set()
    for x in body.values():
        if x.opcode != "dynamic-update-slice" or x.nbytes > written:
            continue
        target = _source(body, x.operands[0])
        if target in parameters.values():
            written += 2 * body[x.operands[1]].nbytes - x.nbytes
            in_place.add(target)
    read = 0.0
    for i, operand in enumerate(each.operands):
        if operand in outer and parameters.get(i) not in in_place:
            read += min(outer[operand].nbytes, _accessed(program, body, i))
    return written + read


def _accessed(program: Program, body: Mapping[str, Instruction], i: int) -> float:
    """Bytes of a fusion's operand that are read through slices; infinite if all."""
    name, total = _parameters(body).get(i), 0.0
    for x in body.values():
        if x.opcode in _SAME and len(x.operands) == 1 and not x.is_root:
            continue
        for place, operand in enumerate(x.operands):
            if operand not in body or _source(body, operand) != name:
                continue
            if x.opcode == "fusion":
                inner = program.computations[x.called[0]]
                total += _accessed(program, inner, place)
            elif x.opcode in _SLICES and place == 0:
                total += _sliced(x)
            else:
                return math.inf
    return total or math.inf


def _parameters(body: Mapping[str, Instruction]) -> dict[int, str]:
    return {int(x.inner): x.name for x in body.values() if x.opcode == "parameter"}


def _source(body: Mapping[str, Instruction], name: str) -> str:
    while body[name].opcode in _SAME and len(body[name].operands) == 1:
        name = body[name].operands[0]
    return name


def _products(
    program: Program, each: Instruction, body: Mapping[str, Instruction]
) -> tuple[float, str]:
    """Floating-point operations of a kernel's products, and how they are computed."""
    if each.opcode == "fusion":
        inner = program.computations.get(each.called[0], {})
        found = [_products(program, x, inner) for x in inner.values()]
        kinds = [kind for flops, kind in found if flops]
        slowest = max(kinds, key=_KINDS.index, default="")
        return sum(flops for flops, _ in found), slowest
    if each.opcode == "custom-call" and (cost := _COST.search(each.attributes)):
        # Of a kernel in Pallas, of bfloat16 parts, what it says of itself.
        return float(cost[1]), "bfloat16"
    operands = [body[name].arrays for name in each.operands[:2] if name in body]
    if each.opcode not in _PRODUCTS or len(operands) < 2 or not all(operands):
        return 0.0, ""
    left, right = operands[0][0], operands[1][0]
    depth = _depth(each, left.shape, right.shape)
    if not depth:
        return 0.0, ""
    given = _PRECISION.search(each.attributes)
    kinds = [x.lower() for x in given.groups()] if given else ["default"]
    if _TF32 in each.attributes:
        kinds = ["3 of TF32"]
    narrow = left.dtype == right.dtype == "bf16"
    kind = "bfloat16" if narrow else max(kinds, key=_KINDS.index)
    return 2.0 * math.prod(each.arrays[0].shape) * depth, kind


def _depth(x: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """How many products each element of a product sums up; 0 if it is none."""
    if x.opcode == "convolution":
        labels = _LABELS.search(x.attributes)
        return math.prod(right) // right[labels[1].index("o")] if labels else 0
    given = (_CONTRACTED if x.opcode == "dot" else _GEMM).search(x.attributes + x.inner)
    if given is None:
        return 0
    return math.prod(left[int(i)] for i in re.findall(r"\d+", given[1]))
