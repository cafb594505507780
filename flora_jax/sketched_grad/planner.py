"""Plans a program backwards, from the wanted outputs of a jaxpr to its inputs.

An equation whose output is only wanted as a sketch is never evaluated.

Why on the gradient's own equations, and not by a custom_vjp around each product of the
forward pass: that would have to follow the *weight* forwards, through every cast,
reshape, loop, checkpoint and custom rule before its product, and it would need a dummy
parameter in the sketch's shape, since the cotangent of a value has that value's shape.
Backwards differentiation has already followed everything; a rule moves one sketch
through one linear equation, and what no rule knows is computed as it stands.

Calls, branches and loops are planned in ``control_flow``, which calls the planner again
for their bodies.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from flora_jax._xla import computed_first
from flora_jax.leaves.mesh import is_explicit
from flora_jax.sketched_grad import control_flow, rewrites
from flora_jax.sketched_grad.program import Fallback, Program, Step
from flora_jax.sketched_grad.rewrites import Operand, SketchRequest, Slot, shape_of
from flora_jax.sketched_grad.rules import COPIES, RULES

# What is wanted of each variable, in the order in which it was asked for: a dict, since
# the order of a set could differ between processes, and with it the compiled program.
Requests: TypeAlias = dict[rewrites.Atom, dict[SketchRequest | None, None]]


class Planner:
    """Plans the programs of a jaxpr and of all bodies in it, each of them once."""

    def __init__(self) -> None:
        """Starts with no programs."""
        self._programs: dict[tuple[Any, tuple[Slot, ...], Any], Program] = {}

    def plan(
        self,
        body: Any,
        wanted: Sequence[Slot],
        late: frozenset[rewrites.Atom] = frozenset(),
    ) -> Program:
        """Plans the program that computes what is wanted of a jaxpr's outputs.

        Args:
          body: the jaxpr, closed if it has constants.
          wanted: indices of outputs, with a sketch or None for the value itself.
          late: factors that are to be sketched where their sketches are read, as what
            reads them in full keeps them until then.

        Returns:
          The program; its outputs are in the order of ``wanted``.
        """
        # A loop asks for its body's plan once per carry to find out whether the carry
        # may be sketched, and again for all of them: unless they are kept, plans of
        # nested loops would multiply.
        key = body, tuple(wanted), late
        if key not in self._programs:
            self._programs[key] = self._planned(*rewrites.opened(body), wanted, late)
        return self._programs[key]

    def _planned(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Any],
        wanted: Sequence[Slot],
        late: frozenset[rewrites.Atom],
    ) -> Program:
        flow, steps, fallbacks = rewrites.DataFlow(jaxpr, RULES), [], []
        requests: Requests = {}
        constants = {*jaxpr.constvars}

        def read(operands: Sequence[Operand]) -> None:
            for atom, request in operands:
                if not isinstance(atom, Literal) and atom not in constants:
                    requests.setdefault(atom, {})[request] = None
                elif request is not None and not request.of_factor:
                    fallback = Fallback(
                        leaf=request.leaf,
                        primitive="constant",
                        shape=shape_of(atom),
                        reason="it is a constant",
                    )
                    fallbacks.append(fallback)

        outputs: list[Operand] = [(jaxpr.outvars[i], request) for i, request in wanted]
        read(outputs)
        # Backwards: when an equation is reached, all readers of its outputs are
        # planned, so that the requests for them are complete.
        for eqn in reversed(jaxpr.eqns):
            slots = _slots(eqn.outvars, requests)
            for step in self._equation(eqn, slots, flow):
                here = [x for x in step.operands if _is_factor_of(x, late)]
                read([x for x in step.operands if x not in here])
                read([(atom, None) for atom, _ in here])
                fallbacks.extend(step.fallbacks)
                steps += [step, *itertools.starmap(_sketched_late, here)]
        inputs = _slots(jaxpr.invars, requests)
        in_full = [leaf for step in steps for leaf in step.read_in_full]
        return Program(inputs, steps[::-1], outputs, fallbacks, in_full, jaxpr, consts)

    def _equation(
        self, eqn: JaxprEqn, wanted: list[Slot], flow: rewrites.DataFlow
    ) -> list[Step]:
        """The steps that compute what is wanted of an equation, the last one first."""
        name, steps = eqn.primitive.name, []
        body_plan = control_flow.BODY_PLANS.get(name)
        if rewrites.called_body(eqn) is not None:
            body_plan = control_flow.plan_call
        # What the equation itself, or its body, has to compute: each request once.
        evaluated: dict[Slot, None] = {}
        for index, request in wanted:
            if request is None:
                evaluated[index, None] = None
                continue
            out = eqn.outvars[index]
            rewrite: rewrites.Rewrite | None = None
            reason: str | None = None  # Why the output is computed in full.
            if is_explicit(getattr(out.aval, "sharding", None)):
                # There each operation of a rule would have to name an output sharding.
                reason = "it lies on a mesh with Explicit axes"
            elif body_plan is control_flow.plan_scan:
                reason = control_flow.why_not_in_loop(eqn, index, request, self.plan)
            elif request.of_factor and _computes_as_it_is(eqn, body_plan):
                reason = "it computes a factor"
            elif body_plan is None:
                found = flow.rewrite(eqn, index, request)
                if isinstance(found, str):
                    reason = found
                else:
                    rewrite = found
            fallbacks = []
            if reason is not None:
                evaluated[index, None] = None
                if request.of_factor:
                    # No fallback: a factor is not part of a gradient.
                    steps.append(_sketched_factor(out, request))
                    continue
                fallbacks.append(Fallback(request.leaf, name, shape_of(out), reason))
                rewrite = _sketch_in_full(out, request)
            if rewrite is None:
                # A body that sketches its own output.
                evaluated[index, request] = None
            else:
                results = [(out, request)]
                steps.append(Step(rewrite.operands, results, rewrite.run, fallbacks))
        # Appended last, and so run first: a fallback above reads what this computes.
        if body_plan and any(request is not None for _, request in evaluated):
            steps.append(body_plan(eqn, list(evaluated), self.plan))
        elif evaluated or eqn.effects:
            steps.append(_unchanged(eqn, list(evaluated), flow.jaxpr))
        return steps


def _computes_as_it_is(eqn: JaxprEqn, body_plan: Any) -> bool:
    """Whether a factor is sketched after an equation, and not inside or before it."""
    if body_plan is None:
        return eqn.primitive.name not in COPIES
    # A body that is planned anew would lose the shardings that the user gave it.
    given = (*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ()))
    return any(isinstance(x, jax.sharding.Sharding) for x in given)


def _slots(variables: Sequence[rewrites.Atom], requests: Requests) -> list[Slot]:
    """What is wanted of some variables, by their indices."""
    return [(i, r) for i, v in enumerate(variables) for r in requests.get(v, ())]


def _sketch_in_full(atom: rewrites.Atom, request: SketchRequest) -> rewrites.Rewrite:
    return rewrites.Rewrite([(atom, None)], lambda s, value: s.sketch(value, request))


def _is_factor_of(operand: Operand, factors: frozenset[rewrites.Atom]) -> bool:
    atom, request = operand
    is_factor = request is not None and request.of_factor
    return is_factor and not isinstance(atom, Literal) and atom in factors


def _sketched_late(atom: rewrites.Atom, request: Any) -> Step:
    """The sketch of a factor right before it is read."""
    made = _sketch_in_full(atom, request)
    return Step(made.operands, [(atom, request)], made.run, (), [request.leaf])


def _sketched_factor(atom: rewrites.Atom, request: SketchRequest) -> Step:
    """A factor and its sketch, for which all later readers of the factor wait."""
    return Step(
        [(atom, None)],
        [(atom, None), (atom, request)],
        lambda s, value: computed_first(value, s.sketch(value, request)),
    )


def _unchanged(eqn: JaxprEqn, wanted: list[Slot], jaxpr: Jaxpr) -> Step:
    """A step that evaluates an equation as it is."""
    # As a jaxpr of one equation: eval_jaxpr knows how to bind every primitive, also
    # those whose parameters hold functions or jaxprs.
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
