"""Plans a program backwards, from the wanted outputs of a jaxpr to its inputs.

An equation whose output is only wanted as a sketch is never evaluated.

Why on the gradient's own equations, and not by a custom_vjp around each product of the
forward pass: that would have to follow the *weight* forwards, through every cast,
reshape, loop, checkpoint and custom rule before its product, and it would need a dummy
parameter in the sketch's shape, since the cotangent of a value has that value's shape.
Backwards differentiation has already followed everything; a rule moves one sketch
through one linear equation, and what no rule knows is computed as it stands.

The sketches of the outputs of calls, branches and loops are made in their bodies. Each
is planned as its body is: what the body's program takes of its inputs, sketches or
values, is what the equation reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from flora_jax.sketched_grad import rules
from flora_jax.sketched_grad.linear_rules import RULES
from flora_jax.sketched_grad.program import Fallback, LeafProjections, Program, Step
from flora_jax.sketched_grad.rules import Operand, SketchRequest, Slot, shape_of

# What is wanted of each variable, in the order in which it was asked for.
Requests: TypeAlias = dict[rules.Atom, dict[SketchRequest | None, None]]
Plan: TypeAlias = Callable[[Any, Sequence[Slot]], Program]  # Planner.plan


class Planner:
    """Plans the programs of a jaxpr and of all bodies in it, each of them once."""

    def __init__(self) -> None:
        """Starts with no programs."""
        self._programs: dict[tuple[Any, tuple[Slot, ...]], Program] = {}

    def plan(self, body: Any, wanted: Sequence[Slot]) -> Program:
        """Plans the program that computes what is wanted of a jaxpr's outputs.

        Args:
          body: the jaxpr, closed if it has constants.
          wanted: numbers of outputs, with a sketch or None for the value itself.

        Returns:
          The program; its outputs are in the order of ``wanted``.
        """
        # A loop asks for its body's plan once per carry to find out whether the carry
        # may be sketched, and again for all of them: unless they are kept, plans of
        # nested loops would multiply.
        key = body, tuple(wanted)
        if key not in self._programs:
            self._programs[key] = self._planned(*rules.opened(body), wanted)
        return self._programs[key]

    def _planned(
        self, jaxpr: Jaxpr, consts: Sequence[Any], wanted: Sequence[Slot]
    ) -> Program:
        flow, steps, fallbacks = rules.DataFlow(jaxpr, RULES), [], []
        requests: Requests = {}
        constants = {*jaxpr.constvars}

        def read(operands: Sequence[Operand]) -> None:
            for atom, request in operands:
                if not isinstance(atom, Literal) and atom not in constants:
                    requests.setdefault(atom, {})[request] = None
                elif request is not None:
                    why = "constant", shape_of(atom), "it is a constant"
                    fallbacks.append(Fallback(request.leaf, *why))

        outputs: list[Operand] = [(jaxpr.outvars[i], request) for i, request in wanted]
        read(outputs)
        for eqn in reversed(jaxpr.eqns):
            slots = _slots(eqn.outvars, requests)
            for step in self._equation(eqn, slots, flow):
                read(step.operands)
                fallbacks.extend(step.fallbacks)
                steps.append(step)
        inputs = _slots(jaxpr.invars, requests)
        return Program(inputs, steps[::-1], outputs, fallbacks, jaxpr, consts)

    def _equation(
        self, eqn: JaxprEqn, wanted: list[Slot], flow: rules.DataFlow
    ) -> list[Step]:
        """The steps that compute what is wanted of an equation, the last one first."""
        name, steps = eqn.primitive.name, []
        in_body = (
            plan_call if rules.called_body(eqn) is not None else _IN_BODY.get(name)
        )
        evaluated: dict[Slot, None] = {}
        for index, request in wanted:
            if request is None:
                evaluated[index, None] = None
                continue
            out, fallbacks = eqn.outvars[index], []
            found = None  # Where a body sketches its own outputs.
            if rules.is_explicit(getattr(out.aval, "sharding", None)):
                found = "it lies on a mesh with Explicit axes"
            elif in_body is None:
                found = flow.rewrite(eqn, index, request)
            elif in_body is plan_scan:
                found = why_not_in_loop(eqn, index, request, self.plan)
            if isinstance(found, str):
                fallbacks.append(Fallback(request.leaf, name, shape_of(out), found))
                found = _sketch_in_full(out, request)
                evaluated[index, None] = None
            if found is None:
                evaluated[index, request] = None
            else:
                results = [(out, request)]
                steps.append(Step(found.operands, results, found.run, fallbacks))
        if in_body and any(request is not None for _, request in evaluated):
            steps.append(in_body(eqn, list(evaluated), self.plan))
        elif evaluated or eqn.effects:
            steps.append(_unchanged(eqn, list(evaluated), flow.jaxpr))
        return steps


def _slots(variables: Sequence[rules.Atom], requests: Requests) -> list[Slot]:
    """What is wanted of some variables, by their numbers."""
    return [(i, r) for i, v in enumerate(variables) for r in requests.get(v, ())]


def _sketch_in_full(atom: rules.Atom, request: SketchRequest) -> rules.Rewrite:
    return rules.Rewrite([(atom, None)], lambda s, value: s.sketch(value, request))


def _unchanged(eqn: JaxprEqn, wanted: list[Slot], jaxpr: Jaxpr) -> Step:
    """A step that evaluates an equation as it is."""
    reads = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, Literal)))
    writes = [eqn.outvars[i] for i, _ in wanted]
    alone = jaxpr.replace(
        constvars=[], invars=reads, outvars=writes, eqns=[eqn], effects=eqn.effects
    )
    return Step(
        [(v, None) for v in reads],
        [(v, None) for v in writes],
        lambda _, *values: eval_jaxpr(alone, (), *values),
    )


def plan_call(eqn: JaxprEqn, wanted: list[Slot], plan: Plan) -> Step:
    """A call of a body that runs once: the body's program in its place.

    What a rematerialized body reads stays behind the barrier that keeps XLA from
    sharing its results with the forward pass.
    """
    program = plan(rules.called_body(eqn), wanted)
    barrier: Any = eqn.params.get("differentiated") and eqn.params["prevent_cse"]
    if not isinstance(barrier, tuple):
        barrier = (barrier,) * len(eqn.invars)
    hidden = [k for k, (i, _) in enumerate(program.inputs) if barrier[i]]
    return Step(
        [(eqn.invars[i], request) for i, request in program.inputs],
        _results(eqn, wanted),
        lambda s, *values: program.run(s, _behind_barrier(values, hidden)),
        program.fallbacks,
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
    inputs = list(dict.fromkeys(slot for p in programs for slot in p.inputs))

    def run(projections: LeafProjections, index: Any, *values: Any) -> list[Any]:
        formed = projections.with_matrices(wanted)

        def branch(program: Program) -> Callable[..., list[Any]]:
            places = [inputs.index(slot) for slot in program.inputs]
            return lambda *given: program.run(formed, [given[k] for k in places])

        return jax.lax.switch(index, [branch(p) for p in programs], *values)

    operands: list[Operand] = [(eqn.invars[0], None)]
    operands += [(eqn.invars[i + 1], request) for i, request in inputs]
    fallbacks = [fallback for p in programs for fallback in p.fallbacks]
    return Step(operands, _results(eqn, wanted), run, fallbacks)


def why_not_in_loop(
    eqn: JaxprEqn, index: int, request: SketchRequest, plan: Plan
) -> str | None:
    """Why an output of a loop is not sketched inside of it, or None if it is."""
    consts, carries = _counts(eqn)
    if index >= carries:
        stacked = 0 in request.axes
        return "it sketches the axis that the loop stacks" if stacked else None
    program, _ = _plan_body(eqn, [(index, request)], plan)
    if program.fallbacks or (index + consts, None) in program.inputs:
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
    stacked = [(i, _moved(request, -1)) for i, request in wanted if i >= carries]
    while True:
        program = plan(eqn.params["jaxpr"], [*carried, *stacked])
        taken = [
            (i - consts, request)
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
    return SketchRequest(request.leaf, tuple(a + by for a in request.axes))


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
    sliced = [slot for slot in program.inputs if slot[0] >= consts + carries]
    order = [*fixed, *starts, *sliced]
    places = [order.index(slot) for slot in program.inputs]
    stacked = [slot for slot in wanted if slot[0] >= carries]

    def run(projections: LeafProjections, *values: Any) -> list[Any]:
        formed = projections.with_matrices(wanted)
        a, b = len(fixed), len(fixed) + len(starts)

        def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            given = [*values[:a], *carry, *x]
            out = program.run(formed, [given[k] for k in places])
            return out[: len(carried)], out[len(carried) :]

        start, slices = list(values[a:b]), list(values[b:])
        settings = (p["length"], p["reverse"], p["unroll"])
        last, stack = jax.lax.scan(body, start, slices, *settings)
        found = dict(zip([*carried, *stacked], [*last, *stack], strict=True))
        return [found[slot] for slot in wanted]

    operands = [(eqn.invars[i], request) for i, request in [*fixed, *starts]]
    operands += [(eqn.invars[i], _moved(request, 1)) for i, request in sliced]
    return Step(operands, _results(eqn, wanted), run, program.fallbacks)


_IN_BODY = {"cond": plan_cond, "scan": plan_scan}  # And plan_call.
