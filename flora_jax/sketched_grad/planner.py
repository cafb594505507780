"""A program that computes sketches of some outputs of a jaxpr, and others in full.

Planned backwards, from what is wanted of the outputs to what that takes of the inputs:
an equation whose output is only wanted as a sketch is never evaluated. Then run
forwards.

Why on the gradient's own equations, and not a tap in the forward pass (a custom_vjp at
each product, found by quax or by an interpreter): a tap has to follow the *weight*
forwards, through every cast, reshape, loop, checkpoint and custom rule that it passes
before its product, and needs a dummy parameter in the sketch's shape, since the
cotangent of a value has that value's shape. Backwards there is nothing to follow that
differentiation has not made already; a rule moves one sketch through one linear
equation, and what no rule knows is computed as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, Literal

from flora_jax.sketched_grad.push import Look, Read, Want, inlined
from flora_jax.sketched_grad.moves import MOVES
from flora_jax.sketched_grad.control_flow import (
    plan_call,
    plan_cond,
    plan_scan,
    scan_reason,
)
from flora_jax.sketched_grad.products import PRODUCTS
from flora_jax.sketched_grad.program import Asked, Program, Step, Stop, is_explicit

_RULES = MOVES | PRODUCTS
_NESTED = {"cond": plan_cond, "scan": plan_scan}


def plan_program(
    jaxpr: Jaxpr, consts: Sequence[Any], asked: Sequence[Asked]
) -> Program:
    """Plans the program that computes what is asked of a jaxpr's outputs.

    Args:
      jaxpr: the jaxpr.
      consts: values of its constants.
      asked: numbers of outputs, with a sketch or None for the value itself.

    Returns:
      The program; its outputs are in the order of ``asked``.
    """
    look, stops, steps = Look(jaxpr, _RULES), [], []
    wanted: dict[Any, dict[Want | None, None]] = {}

    def ask(reads: Sequence[Read]) -> None:
        for atom, want in reads:
            if not isinstance(atom, Literal):
                wanted.setdefault(atom, {})[want] = None
            elif want is not None:
                shape = jnp.shape(atom.val)
                stops.append(Stop(want.leaf, "constant", shape, "it is one"))

    outputs = [(jaxpr.outvars[i], want) for i, want in asked]
    ask(outputs)
    for eqn in reversed(jaxpr.eqns):
        mine = [
            (i, want) for i, v in enumerate(eqn.outvars) for want in wanted.get(v, ())
        ]
        if mine or eqn.effects:
            for step in _plan_equation(eqn, mine, look, stops):
                ask(step.reads)
                steps.append(step)
    for v in jaxpr.constvars:
        for want in wanted.get(v, ()):
            if want is not None:
                steps.append(_in_full(v, want, "constant", "it is one", stops))
    inputs = [
        (i, want) for i, v in enumerate(jaxpr.invars) for want in wanted.get(v, ())
    ]
    return Program(inputs, steps[::-1], outputs, stops, jaxpr, consts)


def _in_full(
    atom: Any, want: Want, primitive: str, reason: str, stops: list[Stop]
) -> Step:
    """A step that sketches a value."""
    stops.append(Stop(want.leaf, primitive, atom.aval.shape, reason))
    return Step(
        [(atom, None)],
        [(atom, want)],
        lambda s, values: [s.sketch(want.leaf, values[0], want.axes)],
    )


def _plan_equation(
    eqn: Any, asked: list[Asked], look: Look, stops: list[Stop]
) -> list[Step]:
    """The steps that give what is asked of an equation, the last one first."""
    name, steps, left = eqn.primitive.name, [], []
    nested = _NESTED.get(name) or (plan_call if inlined(eqn) is not None else None)
    for index, want in asked:
        out = eqn.outvars[index]
        if want is None:
            left.append((index, None))
            continue
        push: Any = None
        if is_explicit(out.aval.sharding):
            push = "it lies on a mesh with Explicit axes"
        elif nested is None:
            push = look.push(eqn, index, want)
        elif nested is plan_scan:
            push = scan_reason(eqn, index, want, plan_program)
        if push is None:
            left.append((index, want))
        elif isinstance(push, str):
            steps.append(_in_full(out, want, name, push, stops))
            left.append((index, None))
        else:
            steps.append(
                Step(
                    push.reads,
                    [(out, want)],
                    lambda s, values, do=push.apply: [do(s, *values)],
                )
            )
    left = list(dict.fromkeys(left))
    if any(want is not None for _, want in left):
        assert nested is not None
        steps.append(nested(eqn, left, stops, plan_program))
    elif left or eqn.effects:
        steps.append(_evaluate(look.jaxpr, eqn, left))
    return steps


def _evaluate(jaxpr: Jaxpr, eqn: Any, asked: list[Asked]) -> Step:
    """The equation as it is."""
    reads = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, Literal)))
    writes = [eqn.outvars[i] for i, _ in asked]
    alone = jaxpr.replace(
        constvars=[], invars=reads, outvars=writes, eqns=[eqn], effects=eqn.effects
    )
    return Step(
        [(v, None) for v in reads],
        [(v, None) for v in writes],
        lambda s, values: eval_jaxpr(alone, (), *values),
    )
