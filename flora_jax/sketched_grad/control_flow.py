"""How calls, branches and loops of a jaxpr are planned: each by its body's program.

What the body's program takes of its inputs, sketches or values, is what the equation
reads; the sketches of its outputs are made inside of the body.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax.extend.core import JaxprEqn

from flora_jax._xla import scan_without_early_buffers
from flora_jax.sketched_grad.program import LeafProjections, Program, Step
from flora_jax.sketched_grad.rewrites import Operand, SketchRequest, Slot, called_body

# Planner.plan, which the plan of an equation calls again for its body.
Plan: TypeAlias = Callable[[Any, Sequence[Slot]], Program]


def plan_call(eqn: JaxprEqn, wanted: list[Slot], plan: Plan) -> Step:
    """A call of a body that runs once: the body's program in its place.

    What a rematerialized body reads stays behind the barrier that keeps XLA from
    sharing its results with the forward pass.
    """
    program = plan(called_body(eqn), wanted)
    barrier: Any = eqn.params.get("differentiated") and eqn.params["prevent_cse"]
    if not isinstance(barrier, tuple):
        barrier = (barrier,) * len(eqn.invars)
    hidden = [k for k, (i, _) in enumerate(program.inputs) if barrier[i]]
    return Step(
        [(eqn.invars[i], request) for i, request in program.inputs],
        _results(eqn, wanted),
        lambda s, *values: program.run(s, _behind_barrier(values, hidden)),
        program.fallbacks,
        program.read_in_full,
    )


def _results(eqn: JaxprEqn, wanted: Sequence[Slot]) -> list[Operand]:
    return [(eqn.outvars[i], request) for i, request in wanted]


def _behind_barrier(values: Sequence[Any], places: list[int]) -> list[Any]:
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


def plan_cond(eqn: JaxprEqn, wanted: list[Slot], plan: Plan) -> Step:
    """Each branch gives the same sketches."""
    programs = [plan(branch, wanted) for branch in eqn.params["branches"]]
    # The union: a branch ignores what only another one reads.
    inputs = list(dict.fromkeys(slot for p in programs for slot in p.inputs))
    platforms = eqn.params.get("branches_platforms")

    def run(projections: LeafProjections, index: Any, *values: Any) -> list[Any]:
        # Outside of the branches, so that S is formed once for all of them.
        formed = projections.with_matrices(wanted)

        def branch(program: Program) -> Callable[..., list[Any]]:
            places = [inputs.index(slot) for slot in program.inputs]
            return lambda *given: program.run(formed, [given[k] for k in places])

        branches = [branch(p) for p in programs]
        if platforms is None:
            return jax.lax.switch(index, branches, *values)
        # As a switch all of them would be lowered for a platform that knows only one.
        by_name = {
            name: branch
            for names, branch in zip(platforms, branches, strict=True)
            for name in names or ("default",)
        }
        return jax.lax.platform_dependent(*values, **by_name)

    operands: list[Operand] = [(eqn.invars[0], None)]
    operands += [(eqn.invars[i + 1], request) for i, request in inputs]
    fallbacks = [fallback for p in programs for fallback in p.fallbacks]
    in_full = [leaf for p in programs for leaf in p.read_in_full]
    return Step(operands, _results(eqn, wanted), run, fallbacks, in_full)


def why_not_in_loop(
    eqn: JaxprEqn, index: int, request: SketchRequest, plan: Plan
) -> str | None:
    """Why an output of a loop is not sketched inside of it, or None if it is."""
    consts, carries = _counts(eqn)
    if index >= carries:
        stacked = 0 in request.axes
        return "it sketches the axis that the loop stacks" if stacked else None
    if request.of_factor:
        return "it is the last value of a carry"
    # A carry c ← c + g can be carried as S c ← S c + S g, as S is linear and the same
    # in each iteration. If the body reads c itself, only the value can be carried.
    program, _ = _plan_body(eqn, [(index, request)], plan)
    reads = [r for i, r in program.inputs if i == index + consts]
    if program.fallbacks or any(r is None or r.of_factor for r in reads):
        return "the loop does more with it than add to it"
    return None


def _counts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many constants and carries a loop has, before the slices."""
    p = eqn.params
    if "ft_in" in p:  # From JAX 0.12 on: a tree of its arguments in three groups.
        consts, carries, _ = p["ft_in"].unpack()
        return len(consts), len(carries)
    return p["num_consts"], p["num_carry"]


def _plan_body(
    eqn: JaxprEqn, wanted: Sequence[Slot], plan: Plan
) -> tuple[Program, list[Slot]]:
    """A program that returns of each carry all that it takes of it; and those."""
    consts, carries = _counts(eqn)
    carried = [slot for slot in wanted if slot[0] < carries]
    # The body sees a slice: each axis of the stacked output is one further to the left.
    stacked = [(i, _moved(request, -1)) for i, request in wanted if i >= carries]
    # A carry that the body reads has to be computed in the iteration before as well.
    # The set of carries only grows, so this ends.
    while True:
        program = plan(eqn.params["jaxpr"], [*carried, *stacked])
        # The sketch of a factor that is a carry is taken of its value.
        taken = [
            (i - consts, None if request and request.of_factor else request)
            for i, request in program.inputs
            if consts <= i < consts + carries
        ]
        more = [slot for slot in taken if slot not in carried]
        if not more:
            return program, carried
        carried += more


def _moved(request: SketchRequest | None, by: int) -> SketchRequest | None:
    """The request for a slice of a stacked array (-1), or for the array (+1)."""
    if request is None:
        return None
    return request.along(a + by for a in request.axes)


def plan_scan(eqn: JaxprEqn, wanted: list[Slot], plan: Plan) -> Step:
    """A loop; S is the same in each of its iterations.

    A stacked output is sketched slice by slice, and a carry that the body only adds to
    is carried as its sketch.
    """
    p = eqn.params
    consts, carries = _counts(eqn)
    program, carried = _plan_body(eqn, wanted, plan)
    fixed = [slot for slot in program.inputs if slot[0] < consts]
    starts = [(i + consts, request) for i, request in carried]
    sliced, in_full = [], list(program.read_in_full)
    for i, request in program.inputs:
        if i < consts + carries:
            continue
        if request and request.of_factor and (i, None) in program.inputs:
            # Sketched by the body, which reads the slice itself too: the sketches of
            # all slices would be kept in addition to them.
            in_full.append(request.leaf)
        else:
            sliced.append((i, request))
    # jax.lax.scan takes constants, carries and slices apart; the program takes them in
    # the order of its own inputs.
    order = [*fixed, *starts, *sliced]
    stacked = [slot for slot in wanted if slot[0] >= carries]

    def run(projections: LeafProjections, *values: Any) -> list[Any]:
        # Before the loop, or S would be formed anew in each iteration.
        formed = projections.with_matrices(wanted)
        a, b = len(fixed), len(fixed) + len(starts)

        def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            given = dict(zip(order, [*values[:a], *carry, *x], strict=True))
            for i, request in program.inputs:
                if request is not None and (i, request) not in given:
                    given[i, request] = formed.sketch(given[i, None], request)
            out = program.run(formed, [given[slot] for slot in program.inputs])
            return out[: len(carried)], out[len(carried) :]

        start, slices = list(values[a:b]), list(values[b:])
        settings = (p["length"], p["reverse"], p["unroll"])
        last, stack = scan_without_early_buffers(body, start, slices, *settings)
        found = dict(zip([*carried, *stacked], [*last, *stack], strict=True))
        return [found[slot] for slot in wanted]

    operands = [(eqn.invars[i], request) for i, request in [*fixed, *starts]]
    operands += [(eqn.invars[i], _moved(request, 1)) for i, request in sliced]
    return Step(operands, _results(eqn, wanted), run, program.fallbacks, in_full)


# By primitive name; calls are found by `called_body`, for their names are many.
BODY_PLANS = {"cond": plan_cond, "scan": plan_scan}
