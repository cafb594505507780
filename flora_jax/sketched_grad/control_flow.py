"""Sketches through calls, branches and loops: of their bodies' outputs.

Each is planned as its body is. What the body's program takes of its inputs, sketches or
values, is what the equation reads. ``plan`` is ``plan_program``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

from flora_jax.sketched_grad.push import Want, inlined, opened
from flora_jax.sketched_grad.program import Asked, Operators, Program, Step, Stop

Plan: TypeAlias = Callable[..., Program]


def plan_call(eqn: Any, asked: list[Asked], stops: list[Stop], plan: Plan) -> Step:
    """A call of a body that runs once: the body's program in its place.

    What a rematerialised body reads stays behind the barrier that keeps XLA from
    sharing its results with the forward pass.
    """
    found = inlined(eqn)
    assert found is not None
    program = plan(*found, asked)
    stops += program.stops
    barrier = [False] * len(eqn.invars)
    if eqn.params.get("differentiated"):
        given = eqn.params["prevent_cse"]
        barrier = list(given) if isinstance(given, tuple) else [given] * len(barrier)
    hidden = [k for k, (i, _) in enumerate(program.inputs) if barrier[i]]

    def run(operators: Operators, values: list[Any]) -> list[Any]:
        return program.run(operators, _behind_barrier(values, hidden))

    reads = [(eqn.invars[i], want) for i, want in program.inputs]
    return Step(reads, [(eqn.outvars[i], want) for i, want in asked], run)


def _behind_barrier(values: list[Any], places: list[int]) -> list[Any]:
    """The values, those at some places behind one barrier that waits for them all."""
    groups: dict[Any, list[int]] = {}
    for k in places:
        # In a shard_map what has been behind a barrier differs between devices if
        # anything there does.
        kind = getattr(jax.typeof(values[k]), "mat", None)
        groups.setdefault(kind, []).append(k)
    values = list(values)
    for members in groups.values():
        behind = jax.lax.optimization_barrier([values[k] for k in members])
        for k, value in zip(members, behind, strict=True):
            values[k] = value
    return values


def plan_cond(eqn: Any, asked: list[Asked], stops: list[Stop], plan: Plan) -> Step:
    """Each branch gives the same sketches."""
    programs = [plan(*opened(b), asked) for b in eqn.params["branches"]]
    inputs = list(dict.fromkeys(item for p in programs for item in p.inputs))
    for program in programs:
        stops += program.stops
    leaves = {want.leaf for _, want in asked if want is not None}

    def run(operators: Operators, values: list[Any]) -> list[Any]:
        index, *operands = values
        formed = operators.formed(leaves)

        def branch(program: Program) -> Callable[..., list[Any]]:
            places = [inputs.index(item) for item in program.inputs]
            return lambda *given: program.run(formed, [given[k] for k in places])

        return jax.lax.switch(index, [branch(p) for p in programs], *operands)

    reads = [(eqn.invars[0], None)]
    reads += [(eqn.invars[i + 1], want) for i, want in inputs]
    return Step(reads, [(eqn.outvars[i], want) for i, want in asked], run)


def scan_reason(eqn: Any, index: int, want: Want, plan: Plan) -> str | None:
    """Why an output of a loop is not sketched inside of it, or None."""
    consts, carries = _counts(eqn)
    if index >= carries:
        return "it sketches the axis that the loop stacks" if 0 in want.axes else None
    program, _ = _close(eqn, [(index, want)], plan)
    reads_itself = (index + consts, None) in program.inputs
    if program.stops or reads_itself:
        return "the loop does more with it than add to it"
    return None


def _counts(eqn: Any) -> tuple[int, int]:
    """How many constants and carries a loop has, before the slices."""
    p = eqn.params
    if "ft_in" in p:  # From JAX 0.12 on: a tree of its arguments in three groups.
        consts, carries, _ = p["ft_in"].unpack()
        return len(consts), len(carries)
    return p["num_consts"], p["num_carry"]


def _close(eqn: Any, asked: list[Asked], plan: Plan) -> tuple[Program, list[Asked]]:
    """The body's program that gives of each carry what it takes of it, and that."""
    consts, carries = _counts(eqn)
    held = [item for item in asked if item[0] < carries]
    stacked = [
        (i, want and Want(want.leaf, tuple(a - 1 for a in want.axes)))
        for i, want in asked
        if i >= carries
    ]
    while True:
        program = plan(*opened(eqn.params["jaxpr"]), held + stacked)
        taken = [
            (i - consts, want)
            for i, want in program.inputs
            if consts <= i < consts + carries
        ]
        more = [item for item in taken if item not in held]
        if not more:
            return program, held
        held += more


def plan_scan(eqn: Any, asked: list[Asked], stops: list[Stop], plan: Plan) -> Step:
    """A loop: S is the same in each of its steps.

    A stacked output is sketched slice by slice, and a carry that the body only adds to
    is carried as its sketch.
    """
    p = eqn.params
    consts, carries = _counts(eqn)
    program, held = _close(eqn, asked, plan)
    stops += program.stops
    leaves = {want.leaf for _, want in asked if want is not None}
    fixed = [item for item in program.inputs if item[0] < consts]
    sliced = [item for item in program.inputs if item[0] >= consts + carries]
    order = [(i + consts, want) for i, want in held]
    where = {item: k for k, item in enumerate([*fixed, *order, *sliced])}
    places = [where[item] for item in program.inputs]

    def run(operators: Operators, values: list[Any]) -> list[Any]:
        formed, ends = operators.formed(leaves), [len(fixed), len(fixed) + len(held)]
        same, start, slices = values[: ends[0]], values[slice(*ends)], values[ends[1] :]

        def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            given = [*same, *carry, *x]
            out = program.run(formed, [given[k] for k in places])
            return out[: len(held)], out[len(held) :]

        last, stack = jax.lax.scan(
            body, start, slices, p["length"], p["reverse"], p["unroll"]
        )
        found = dict(zip([*held, *ys], [*last, *stack], strict=True))
        return [found[item] for item in asked]

    ys = [item for item in asked if item[0] >= carries]
    reads = [(eqn.invars[i], want) for i, want in [*fixed, *order]]
    for i, want in sliced:
        axes = want and Want(want.leaf, tuple(a + 1 for a in want.axes))
        reads.append((eqn.invars[i], axes))
    return Step(reads, [(eqn.outvars[i], want) for i, want in asked], run)
