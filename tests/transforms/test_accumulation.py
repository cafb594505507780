"""Sketched accumulation against the oracle, optax and its own contract."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from flora_jax import LeafPlan
from flora_jax.sketching.sketcher import Sketcher
from flora_jax.transforms.accumulation import accumulate, estimate
from tests.common import assert_close
from tests.reference import folds
from tests.reference.accumulation import sketched_accumulation
from tests.transforms.samples import case_id, run, sampled_matrix, sketch_and_rest

ALL = tuple(folds.SHAPES)


def growing(cycle):
    """Cycles of 2, 3, 4 … micro-steps."""
    return cycle + 2


# Every shape on its columns and on its rows; nine micro-steps make three whole cycles.
CASES = [
    (fj.Gaussian(), "smaller", True, 3, 8, ALL),
    (fj.Gaussian(), "larger", False, growing, 9, ("tall", "square")),
    (fj.Gaussian(), "left", False, 3, 9, ("tall",)),
    (fj.Gaussian(), "right", True, growing, 8, ("wide",)),
    (fj.CountSketch(), "smaller", True, growing, 8, ("wide", "stack")),
    (fj.CountSketch(), "larger", False, 3, 8, ("wide", "cut", "stack")),
    (fj.CountSketch(), "left", True, 3, 9, ("tall",)),
    (fj.CountSketch(), "right", False, growing, 9, ("wide",)),
    (fj.CountSketch("isometric"), "smaller", True, 3, 8, ("wide",)),
]


def accumulation(inner=None, every_k=3, rank=4, **settings):
    settings = {"min_dim_size": 8, "key": 11, **settings}
    inner = optax.identity() if inner is None else inner
    sketch, rest = sketch_and_rest(rank, settings)
    return fj.compressed_accumulation(inner, every_k, sketch, **rest)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("projection", "side", "mean", "k", "steps", "names"), CASES, ids=case_id
)
def test_equals_algorithm_1(projection, side, mean, k, steps, names):
    gradients = folds.gradients(steps, names)
    tx = accumulation(
        optax.scale(-0.5),
        k,
        {name: folds.RANKS[name] for name in names},
        projection=projection,
        side=side,
        use_grad_mean=mean,
    )
    updates, state = run(tx, gradients)
    for name in names:
        results = [
            sketched_accumulation(
                matrices,
                sampled_matrix(projection, 11, "compressed_accumulation", name, side),
                k if callable(k) else lambda cycle: k,
                mean,
                folds.left(name, side),
            )
            for matrices in zip(
                *(folds.fold(name, g[name]) for g in gradients), strict=True
            )
        ]
        for i, estimates in enumerate(zip(*(r[0] for r in results), strict=True)):
            update = folds.fold(name, updates[i][name])
            if estimates[0] is None:
                assert not update.any()
            else:
                assert_close(update, -0.5 * np.stack(estimates), "float32")
        last = np.stack([r[1] for r in results])
        kept = np.asarray(state.acc_grads[name], np.float64).reshape(last.shape)
        assert_close(kept, last, "float32")


@pytest.mark.sample(1)
@pytest.mark.filterwarnings("ignore:.* sketches only 0 of . leaves:UserWarning")
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("every_k", [3, growing])
def test_dense_leaves_equal_multisteps(every_k, mean):
    rng = np.random.default_rng(1)
    shapes = {"bias": (16,), "scalar": (), "masked": (16, 24), "narrow": (16, 4)}
    gradients = [
        {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
        for _ in range(8)
    ]
    tx = accumulation(
        optax.adam(1e-2),
        every_k,
        mask=lambda path, shape: path != "masked",
        use_grad_mean=mean,
    )
    plain = optax.MultiSteps(optax.adam(1e-2), every_k, use_grad_mean=mean)
    updates, state = run(tx, gradients)
    expected, multi = run(plain.gradient_transformation(), gradients)
    assert_close(updates, expected)
    assert_close(state.acc_grads, multi.acc_grads)
    assert (state.mini_step, state.gradient_step) == multi[:2]


@pytest.mark.sample(1)
@pytest.mark.parametrize("projection", [fj.Gaussian(), fj.CountSketch()])
def test_a_stack_equals_its_slices_under_one_projection(projection):
    """The slices have the stack's path, and so its S."""
    stacks = np.random.default_rng(2).normal(size=(4, 3, 16, 24)).astype(np.float32)
    tx = accumulation(projection=projection, every_k=2)
    whole, _ = run(tx, list(stacks))
    step = jax.jit(tx.update)
    for i in range(3):
        state = tx.init(stacks[0, i])
        for gradient, expected in zip(stacks[:, i], whole, strict=True):
            update, state = step(gradient, state)
            assert_close(update, expected[i])


@pytest.mark.sample(1)
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("mean", [True, False])
def test_full_rank_equals_the_plain_accumulator(axis, mean):
    """CountSketch of rank m is a signed permutation; the factories leave it dense."""
    plan = LeafPlan(
        "w", (3, 8, 12), (0,), (1,), (2,), axis, rank=12 if axis == -1 else 8
    )
    sketch = fj.Sketch(plan.rank, fj.CountSketch("unbiased"))
    sketcher = Sketcher("identity", sketch)
    gradients = np.random.default_rng(3).normal(size=(4, 3, 8, 12)).astype(np.float32)

    @jax.jit
    def run_cycle(gradients):
        acc = [jnp.zeros(plan.state_shape)]
        sampled = sketcher.sample([plan], jnp.zeros(2, jnp.uint32), 0)
        for i, gradient in enumerate(gradients):
            acc = accumulate(sketcher, [plan], mean, None, sampled, [gradient], acc, i)
        return *acc, *estimate(sketcher, [plan], None, sampled, acc)

    acc, found = run_cycle(gradients)
    expected = gradients.mean(axis=0) if mean else gradients.sum(axis=0)
    assert_close(found, expected)
    assert np.abs(np.asarray(acc) - expected).max() > 0.1


def test_the_estimate_of_a_mean_is_the_mean_of_estimates():
    gradients = folds.gradients(3, ("tall",))
    (*_, accumulated), _ = run(accumulation(), gradients)
    mean = {"tall": np.mean([g["tall"] for g in gradients], axis=0)}
    (*_, at_once), _ = run(accumulation(), 3 * [mean])
    assert_close(accumulated, at_once)


def test_inner_runs_once_per_cycle():
    gradients = folds.gradients(7, ("tall",))
    step = jax.jit((tx := accumulation(optax.adam(1e-2))).update)
    state, counts = tx.init(gradients[0]), []
    for gradient in gradients:
        updates, state = step(gradient, state)
        counts.append(int(state.inner_opt_state[0].count))
        assert np.asarray(updates["tall"]).any() == bool(fj.has_updated(state))
    assert counts == [0, 0, 1, 1, 1, 2, 2]
    assert (int(state.mini_step), int(state.gradient_step)) == (1, 2)


def test_has_updated_finds_the_state_in_a_chain():
    tx = optax.chain(optax.identity(), accumulation(every_k=2))
    gradients = folds.gradients(4, ("tall",))
    state, step, seen = tx.init(gradients[0]), jax.jit(tx.update), []
    assert not fj.has_updated(state)
    for gradient in gradients:
        _, state = step(gradient, state)
        seen.append(bool(fj.has_updated(state)))
    assert seen == [False, True, False, True]


def record():
    """An inner transformation that keeps the extra argument and the parameters."""

    def update(updates, state, params=None, *, loss, **extra_args):
        del state, extra_args
        return updates, {"loss": jnp.float32(loss), "params": params}

    def init(params):
        return {"loss": jnp.float32(0), "params": params}

    return optax.GradientTransformationExtraArgs(init, update)


def test_extra_arguments_and_parameters_reach_inner_at_the_end_of_a_cycle():
    params = {"w": jnp.ones((16, 16))}
    tx = accumulation(record(), every_k=2)
    state = tx.init(params)
    for i, seen in enumerate([0.0, 2.0, 2.0, 4.0]):
        params = jax.tree.map(lambda x: x + 1, params)
        _, state = jax.jit(tx.update)(params, state, params, loss=i + 1.0, other=0)
        assert float(state.inner_opt_state["loss"]) == seen
        assert float(state.inner_opt_state["params"]["w"][0, 0]) == 1 + seen


class TestSkip:
    """A skipped micro-step is as if it had never been."""

    gradients = folds.gradients(7, ("stack",))

    def tx(self, skip=optax.skip_not_finite, **settings):
        return accumulation(optax.adam(1e-2), should_skip_update_fn=skip, **settings)

    @pytest.mark.sample(1)
    @pytest.mark.parametrize("mean", [True, False])
    def test_leaves_everything_but_skip_state(self, mean):
        tx = self.tx(use_grad_mean=mean)
        step = jax.jit(tx.update)
        bad = jax.tree.map(np.copy, self.gradients[0])
        bad["stack"][1, 2, 3] = np.nan

        def run_with_bad_one(where):
            state, updates = tx.init(bad), []
            for i, gradient in enumerate(self.gradients):
                if i == where:
                    before = state
                    nothing, state = step(bad, state)
                    assert not any(np.asarray(u).any() for u in nothing.values())
                    assert state.skip_state["should_skip"]
                    assert int(state.skip_state["num_not_finite"]) == 1
                    after = state._replace(skip_state=before.skip_state)
                    jax.tree.map(np.testing.assert_array_equal, after, before)
                update, state = step(gradient, state)
                updates.append(update)
            return updates, state

        expected = run_with_bad_one(None)
        assert all(np.asarray(expected[0][i]["stack"]).any() for i in (2, 5))
        for where in range(4):  # First, within, last of its cycle; first of the next.
            result = run_with_bad_one(where)
            jax.tree.map(np.testing.assert_array_equal, result, expected)

    def test_is_told_the_cycle_and_the_parameters(self):
        def skip(updates, gradient_step, params):
            del updates
            return gradient_step >= params["stack"][0, 0, 0], gradient_step

        params = jax.tree.map(jnp.ones_like, self.gradients[0])
        _, state = run(self.tx(skip), self.gradients, params)
        # The first cycle ends; then every micro-step is skipped.
        assert (int(state.mini_step), int(state.gradient_step)) == (0, 1)
        assert int(state.skip_state) == 1

    def test_must_return_a_bool_scalar(self):
        tx = self.tx(lambda updates, *_: (jnp.zeros(2, bool), ()))
        state = tx.init(self.gradients[0])
        with pytest.raises(ValueError, match="bool scalar"):
            tx.update(self.gradients[0], state)
