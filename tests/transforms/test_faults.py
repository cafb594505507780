"""NaN and Inf in gradients: neither accumulator nor key nor counter is lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.conformance.cases import CASES, assert_identical, each_of, run_layer
from tests.conformance.states import COUNTERS, own_states
from tests.reference import folds

# Beyond one of each kind of state in the slow tier: tests/conformance/test_wrappers.py
# has NaN for all cases.
kinds_of_state = each_of(CASES, CASES[:3])


def spoiled(grads, value):
    """Gradients with one bad number in the kernel."""
    kernel = grads["layer"]["kernel"].at[2, 3].set(value)
    return {"layer": {**grads["layer"], "kernel": kernel}}


@pytest.mark.full
@kinds_of_state
def test_apply_if_finite_with_several_bad_steps_in_a_row(case):
    """Before each good step: within an interval and a cycle, and at their ends."""
    reference, limit = run_layer(case), 3
    tx, params = optax.apply_if_finite(case(), limit), reference.params
    step = jax.jit(tx.update)

    def run(bad_before=()):
        state, updates = tx.init(params), None
        for grads in reference.grads:
            for value in bad_before:
                before = state.inner_state
                nothing, state = step(spoiled(grads, value), state, params)
                assert not any(np.any(x) for x in jax.tree.leaves(nothing))
                assert_identical(state.inner_state, before)
            updates, state = step(grads, state, params)
        return updates, state.inner_state

    assert_identical(run([jnp.inf, -jnp.inf, jnp.nan]), run())
    # optax gives in after `limit` of them. What they spoil is no key and no counter.
    _, state = step(reference.grads[0], tx.init(params), params)
    for _ in range(limit + 1):
        _, state = step(spoiled(reference.grads[1], jnp.inf), state, params)
    _, good = step(reference.grads[1], tx.init(params), params)
    _, good = step(reference.grads[1], good, params)
    for ours, theirs in zip(own_states(state), own_states(good), strict=True):
        for field in ("key", "spec", *COUNTERS[type(ours)]):
            if hasattr(ours, field):
                assert_identical(getattr(ours, field), getattr(theirs, field))


def growing(cycle):
    """Cycles of 2, 3, 4 … micro-steps."""
    return cycle + 2


def test_skip_large_updates_loses_no_micro_step():
    """Huge ones, and those whose square is infinite or undefined."""
    gradients = folds.gradients(9, ("tall",))
    limit = 4 * 32 * 16  # E‖G‖² of a good one is a quarter of it.
    tx = fj.compressed_accumulation(
        optax.adam(1e-2),
        growing,
        fj.Sketch(4, min_dim_size=8),
        should_skip_update_fn=functools.partial(
            optax.skip_large_updates, max_squared_norm=limit
        ),
    )
    step = jax.jit(tx.update)

    def run(bad):
        state, updates = tx.init(gradients[0]), []
        for gradient in gradients:
            for value in bad:
                before = state
                spike = {"tall": gradient["tall"].copy()}
                spike["tall"][3, 5] = value
                nothing, state = step(spike, state)
                assert not np.asarray(nothing["tall"]).any()
                assert state.skip_state["should_skip"]
                norm = float(state.skip_state["norm_squared"])
                assert not norm < limit
                assert_identical(
                    state._replace(skip_state=()), before._replace(skip_state=())
                )
            update, state = step(gradient, state)
            assert not state.skip_state["should_skip"]
            updates.append(update)
        return updates, state

    expected = run(())
    assert int(expected[1].gradient_step) == 3
    assert int(expected[1].mini_step) == 0
    assert_identical(run([1e3, 3e38, np.inf, np.nan]), expected)


# The rest is the recipe for training in float16 with a dynamic scale of the loss, and
# what it must do.
EVERY, GROW_AFTER, FIRST_SCALE = 4, 10, 2.0**42
HALF, FULL = jnp.float16, jnp.float32


def loss_fn(params, batch):
    """Small, as its gradients are: most of them are below float16 without a scale."""
    x, y = batch
    hidden = jnp.tanh(x.astype(params["in"].dtype) @ params["in"])
    return 1e-5 * jnp.mean((hidden @ params["out"] - y) ** 2, dtype=FULL)


accumulation = fj.compressed_accumulation(
    optax.adam(1e-2, eps=1e-12),
    EVERY,
    fj.Sketch(4, min_dim_size=8),
    should_skip_update_fn=optax.skip_not_finite,
)


@jax.jit
def micro_step(params, state, scale, good, batch):
    """One micro-step; a scale that is too large costs this batch and nothing else."""
    half = optax.tree.cast(params, HALF)
    grads = jax.grad(lambda half: scale * loss_fn(half, batch))(half)
    # Unscaled before they are added up: the scale may change within a cycle.
    grads = optax.tree.scale(1 / scale, optax.tree.cast(grads, FULL))
    updates, state = accumulation.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    skipped = state.skip_state["should_skip"]
    good = jnp.where(skipped, 0, good + 1)
    grown = jnp.where(good % GROW_AFTER == 0, 2 * scale, scale)
    return params, state, jnp.where(skipped, scale / 2, grown), good


@jax.jit
def plain_step(params, state, batch):
    """The same in float32."""
    grads = jax.grad(loss_fn)(params, batch)
    updates, state = accumulation.update(grads, state, params)
    return optax.apply_updates(params, updates), state


class TestLossScale:
    rng = np.random.default_rng(0)
    first = {
        "in": jnp.asarray(rng.normal(size=(16, 24)) / 4, FULL),
        "out": jnp.asarray(rng.normal(size=(24, 16)) / 5, FULL),
    }
    x = rng.normal(size=(120, 32, 16))
    batches = jnp.asarray(x, FULL), jnp.asarray(np.sin(2 * x), FULL)

    def batch(self, i):
        return jax.tree.map(lambda x: x[i], self.batches)

    def scaled_run(self, scale=FIRST_SCALE, growing=True):
        """The last parameters and state, and what was skipped at which micro-step."""
        params, state = self.first, accumulation.init(self.first)
        scale, good, skipped = jnp.float32(scale), jnp.int32(0), {}
        for i in range(len(self.x)):
            before = state
            params, state, new, good = micro_step(
                params, state, scale, good, self.batch(i)
            )
            if state.skip_state["should_skip"]:
                skipped[i] = int(before.mini_step)
                assert new == scale / 2
                assert_identical(
                    state._replace(skip_state=()), before._replace(skip_state=())
                )
            scale = new if growing else scale
        return params, state, scale, skipped

    def plain_run(self, skipped):
        params, state = self.first, accumulation.init(self.first)
        for i in range(len(self.x)):
            if i not in skipped:
                params, state = plain_step(params, state, self.batch(i))
        return params, state

    def distance(self, params, expected):
        """From the expected parameters, as a part of the way that those have gone."""
        difference, way = (
            optax.tree.norm(optax.tree.sub(expected, x)) for x in (params, self.first)
        )
        return float(difference / way)

    @pytest.mark.full
    def test_ends_where_float32_does(self):
        params, state, _, skipped = self.scaled_run()
        expected, plain = self.plain_run(skipped)
        # Rounding to 11 bits of each gradient, of the parameters that it is taken at,
        # and of what lies between.
        assert self.distance(params, expected) < 0.002
        # No micro-step is missing.
        assert int(state.gradient_step) == int(plain.gradient_step)
        assert int(state.mini_step) == int(plain.mini_step)
        taken = int(state.gradient_step) * EVERY + int(state.mini_step)
        assert taken == len(self.x) - len(skipped)
        assert_identical(state.key, accumulation.init(self.first).key)

    def test_skips_at_the_start_and_within_cycles_and_recovers(self):
        _, _, scale, skipped = self.scaled_run()
        start = next(i for i in range(len(self.x)) if i not in skipped)
        assert start >= 2  # Until the first scale has become small enough.
        within = [i for i, mini_step in skipped.items() if mini_step > 0]
        assert within  # When it has grown too large again.
        # It ends within a doubling or two of the largest that fits.
        fits = FIRST_SCALE / 2**start
        assert fits / 2 <= float(scale) <= 4 * fits

    @pytest.mark.full
    def test_without_a_scale_gradients_are_lost(self):
        params, _, _, skipped = self.scaled_run(scale=1.0, growing=False)
        assert not skipped
        expected, _ = self.plain_run(skipped)
        assert self.distance(params, expected) > 0.2
