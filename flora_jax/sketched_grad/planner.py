"""Plans a program backwards, from the wanted outputs of a jaxpr to its inputs.

An equation whose output is only wanted as a sketch is never evaluated.

Why on the gradient's own equations, and not by a custom_vjp around each product of the
forward pass: that would have to follow the *weight* forwards, through every cast,
reshape, loop, checkpoint and custom rule before its product, and it would need a dummy
parameter in the sketch's shape, since the cotangent of a value has that value's shape.
Backwards differentiation has already followed everything; a rule moves one sketch
through one linear equation, and what no rule knows is computed as it stands.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from flora_jax.sketched_grad.arithmetic_rules import ARITHMETIC_RULES
from flora_jax.sketched_grad.control_flow import (
    plan_call,
    plan_cond,
    plan_scan,
    why_not_in_loop,
)
from flora_jax.sketched_grad.program import Fallback, Program, Step, is_explicit
from flora_jax.sketched_grad.rules import (
    Atom,
    DataFlow,
    Operand,
    Rewrite,
    SketchRequest,
    Slot,
    called_body,
    opened,
    shape_of,
)
from flora_jax.sketched_grad.shape_rules import SHAPE_RULES

_RULES = SHAPE_RULES | ARITHMETIC_RULES
_CONTROL_FLOW = {"cond": plan_cond, "scan": plan_scan}


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
            self._programs[key] = self._planned(*opened(body), wanted)
        return self._programs[key]

    def _planned(
        self, jaxpr: Jaxpr, consts: Sequence[Any], wanted: Sequence[Slot]
    ) -> Program:
        flow, steps, fallbacks = DataFlow(jaxpr, _RULES), [], []
        requests: dict[Atom, dict[SketchRequest | None, None]] = {}
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
        self, eqn: JaxprEqn, wanted: list[Slot], flow: DataFlow
    ) -> list[Step]:
        """The steps that compute what is wanted of an equation, the last one first."""
        name, steps = eqn.primitive.name, []
        control_flow = _CONTROL_FLOW.get(name)
        if called_body(eqn) is not None:
            control_flow = plan_call
        evaluated: dict[Slot, None] = {}
        for index, request in wanted:
            if request is None:
                evaluated[index, None] = None
                continue
            out, fallbacks = eqn.outvars[index], []
            found = None  # Where a body sketches its own outputs.
            if is_explicit(getattr(out.aval, "sharding", None)):
                found = "it lies on a mesh with Explicit axes"
            elif control_flow is None:
                found = flow.rewrite(eqn, index, request)
            elif control_flow is plan_scan:
                found = why_not_in_loop(eqn, index, request, self.plan)
            if isinstance(found, str):
                fallbacks.append(Fallback(request.leaf, name, shape_of(out), found))
                found = _sketch_in_full(out, request)
                evaluated[index, None] = None
            if found is None:
                evaluated[index, request] = None
            else:
                run = functools.partial(_run_rewrite, found)
                steps.append(Step(found.operands, [(out, request)], run, fallbacks))
        if control_flow and any(request is not None for _, request in evaluated):
            steps.append(control_flow(eqn, list(evaluated), self.plan))
        elif evaluated or eqn.effects:
            steps.append(_unchanged(eqn, list(evaluated), flow.jaxpr))
        return steps


def _slots(
    variables: Sequence[Atom], requests: dict[Atom, dict[SketchRequest | None, None]]
) -> list[Slot]:
    """What is wanted of some variables, by their numbers."""
    return [(i, r) for i, v in enumerate(variables) for r in requests.get(v, ())]


def _sketch_in_full(atom: Atom, request: SketchRequest) -> Rewrite:
    return Rewrite([(atom, None)], lambda s, value: s.sketch(value, request))


def _run_rewrite(rewrite: Rewrite, projections: Any, *values: Any) -> list[jax.Array]:
    return [rewrite.compute(projections, *values)]


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
