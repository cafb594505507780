"""What sketched momentum equals at full rank, and what a resample does to it."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from flora_jax import LeafPlan
from flora_jax.sketching.sketcher import ScaledLeaf, Sketcher
from flora_jax.transforms import momentum as momentum_module
from tests.common import assert_close
from tests.transforms.samples import run

UNCOMPRESSED = {
    "paper": optax.ema(0.5, debias=False),
    "nesterov": optax.chain(optax.scale(0.5), optax.trace(0.5, nesterov=True)),
    "fresh": optax.ema(0.5, debias=False),
    "residual": optax.ema(0.5, debias=False),
}
# The public factories keep a leaf dense whose rank is its width: plans made by hand.
FULL = {
    "columns": LeafPlan("w", (16, 24), (), (0,), (1,), axis=-1, rank=24),
    "rows": LeafPlan("w", (16, 24), (), (0,), (1,), axis=-2, rank=16),
    "stack": LeafPlan("w", (3, 8, 12), (0,), (1,), (2,), axis=-1, rank=12),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("plan", FULL.values(), ids=FULL)
def test_full_rank_equals_the_uncompressed_chain(plan):
    """CountSketch of rank m is a signed permutation, so S'S = I."""
    sketch = fj.Sketch(plan.rank, fj.CountSketch("unbiased"))
    sketcher = Sketcher("identity", sketch)
    zero = jnp.zeros([], jnp.int32)
    key = jnp.array([0, 5], jnp.uint32)
    fields = {"count": zero, "epoch": zero, "key": key, "spec": key}

    def run_estimator(estimator, gradients):
        momentum = {"w": jnp.zeros(plan.state_shape)}
        state = fj.CompressedMomentumState(**fields, momentum=momentum)

        @jax.jit
        def step(gradient, state):
            (update,), state = momentum_module.momentum_step(
                sketcher,
                estimator,
                (False, [plan]),
                [ScaledLeaf(gradient)],
                state,
                None,
                0.5,
                2,
            )
            return update.value(), state

        for gradient in gradients:
            update, state = step(gradient, state)
            yield update

    rng = np.random.default_rng(2)
    gradients = [rng.normal(size=plan.shape).astype(np.float32) for _ in range(5)]
    for estimator, tx in UNCOMPRESSED.items():
        expected, _ = run(tx, gradients)
        for update, other in zip(
            run_estimator(estimator, gradients), expected, strict=True
        ):
            assert_close(update, other)


def cosine(x, y):
    x, y = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    return x @ y / math.sqrt((x @ x) * (y @ y))


@pytest.mark.full
@pytest.mark.parametrize(
    ("projection", "expected"),
    [
        (fj.Gaussian(), 1 / math.sqrt(1 + (512 + 1) / 256)),
        (fj.CountSketch(), math.sqrt(256 / 512)),
    ],
    ids=["Gaussian", "CountSketch"],
)
def test_the_estimate_survives_a_resample(projection, expected):
    """Transferring with a wrong key would leave a cosine near zero.

    Before the last update, which has no gradient, S is replaced: its cosine with the
    update before it is that of an estimate M S with its own estimate M S S'' S'.
    """
    sketch = fj.Sketch(256, projection, side="right", min_dim_size=64)
    tx = fj.compressed_momentum(0.5, sketch, resample_every=2, estimator="paper")
    rng = np.random.default_rng(3)
    gradients = rng.normal(size=(3, 64, 512)).astype(np.float32)
    gradients[2] = 0

    @jax.jit
    def two_updates(key):
        state = tx.init(jnp.zeros((64, 512)))._replace(key=key)
        outputs = []
        for gradient in gradients:
            update, state = tx.update(jnp.asarray(gradient), state)
            outputs.append(update)
        return outputs[1:]

    keys = jax.random.key_data(jax.random.split(jax.random.key(4), 8))
    cosines = np.array([cosine(*two_updates(key)) for key in keys])
    error = cosines.std(ddof=1) / math.sqrt(len(cosines))
    assert 0 < error < 2e-3
    assert abs(cosines.mean() - expected) < 5 * error


def test_within_an_interval_the_estimate_only_decays():
    """Without a gradient and a resample the update is multiplied by the decay."""
    gradients = list(np.random.default_rng(5).normal(size=(3, 16, 24)))
    gradients = [g.astype(np.float32) for g in gradients]
    gradients[2] *= 0
    sketch = fj.Sketch(4, min_dim_size=8)
    tx = fj.compressed_momentum(0.5, sketch, resample_every=3, estimator="paper")
    updates, _ = run(tx, gradients)
    assert_close(updates[2], 0.5 * updates[1])


class TestStabilityWarning:
    params = {"small": jnp.zeros((16, 16)), "large": jnp.zeros((64, 64))}

    def init(self, decay, every, rank=8):
        sketch = fj.Sketch(rank, min_dim_size=8)
        tx = fj.compressed_momentum(decay, sketch, resample_every=every)
        return tx.init(self.params)

    @pytest.mark.parametrize(
        ("decay", "every", "rho", "effect"),
        # rho = decay**(2 every) * 64/8; the noise gain is 1/(1 - rho).
        [(0.9, 10, "0.973", "has 36.5 times the noise"), (0.9, 9, "1.2", "diverges")],
    )
    def test_names_the_worst_leaf_and_the_remedy(self, decay, every, rho, effect):
        pattern = f"'large' .width 64, rank 8.* is {rho}, so that the momentum {effect}"
        # 0.9**(2 k) * 8 <= 0.5 from k = ln(16)/(2 ln(1/0.9)) = 13.2 on.
        with pytest.warns(UserWarning, match=pattern + "; use resample_every >= 14"):
            self.init(decay, every)

    def test_points_at_the_caller(self):
        with pytest.warns(UserWarning, match="rho") as caught:
            self.init(0.9, 13)
        assert caught[0].filename == __file__

    @pytest.mark.sample(1)
    @pytest.mark.parametrize(
        ("decay", "every", "rank"), [(0.9, 14, 8), (0.9, None, 8), (0.0, 1, 8)]
    )
    def test_is_silent_where_transfers_are_safe(self, decay, every, rank):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.init(decay, every, rank)
