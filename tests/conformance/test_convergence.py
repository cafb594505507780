"""The four problems that optax asks its own optimizers to solve, with 2x2 sketches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.conformance.cases import EVERY_K, SMALL, every_case, named

# As many as optax takes.
STEPS = 30_000
START = {
    "parabola": jnp.array([-1.0, 10.0, 1.0]),
    "rosenbrock": jnp.zeros(2),
    "matrix_parabola": jnp.zeros((2, 2)),
    "mixed": (jnp.zeros(3), jnp.zeros((2, 2))),
}
GOAL = {
    "parabola": jnp.array([1.0, -1.0, 1.0]),
    "rosenbrock": jnp.ones(2),
    "matrix_parabola": jnp.array([[3.0, -2.0], [1.0, 4.0]]),
    "mixed": (jnp.array([1.0, -1.0, 2.0]), jnp.array([[1.0, 0.0], [-1.0, 1.0]])),
}


def loss(params):
    """The sum of the four: no transformation here mixes leaves."""
    x, y = params["rosenbrock"]
    others = {k: v for k, v in params.items() if k != "rosenbrock"}
    distance = optax.tree.sub(others, {k: GOAL[k] for k in others})
    parabolas = optax.tree.norm(distance, squared=True)
    return parabolas + (1 - x) ** 2 + 100 * (y - x**2) ** 2


def optimizer(case):
    """The case with a rate that decays to zero, and with it the projection's noise.

    Momentum alone is a plain descent: Rosenbrock's curvature of 1000 at the minimum
    allows no larger rate. The others normalize: their rate is a distance per step.
    """
    updates = STEPS // EVERY_K if case.takes("every_k") else STEPS
    rate = 1e-3 if case.factory is fj.compressed_momentum else 1e-2
    schedule = optax.cosine_decay_schedule(rate, updates)
    if case.takes("learning_rate"):
        # A decay of 0.01 would move the minimum itself by more than the tolerance.
        decay = {"weight_decay": 1e-4} if "weight_decay" in case.options else {}
        sketch = SMALL
        # Of rank 1, where all columns may cancel: APOLLO's limiter is slow to recover.
        if case.factory is fj.apollo:
            sketch = dataclasses.replace(SMALL, projection=fj.Gaussian())
        return case(sketch, learning_rate=schedule, **decay)
    # What a subspace has inside makes directions; the others, updates.
    if case.inner is not None and case.factory is not fj.scale_in_subspace:
        return case(SMALL, inner=case.inner(SMALL, schedule))
    return optax.chain(case(SMALL), optax.scale_by_learning_rate(schedule))


def solve(tx):
    """Parameters after all steps, from START."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def steps(params, state):
        return jax.lax.scan(step, (params, state), length=STEPS)[0][0]

    return steps(START, tx.init(START))


def test_the_matrices_are_sketched_and_the_vectors_are_not():
    plans = named(fj.plan_leaves(START, SMALL))
    sketched = {path for path, plan in plans.items() if plan.dense_reason is None}
    assert sketched == {"matrix_parabola", "mixed/1"}


@pytest.mark.sample(1)
@every_case
def test_it_converges(case):
    params, goal = named(solve(optimizer(case))), named(GOAL)
    # optax's own tolerance; some entry of each starts at least 1 away.
    for problem, start in named(START).items():
        assert np.abs(start - goal[problem]).max() >= 1
        np.testing.assert_allclose(
            params[problem], goal[problem], rtol=3e-2, atol=3e-2, err_msg=problem
        )
