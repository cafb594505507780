"""The factored second moment against the oracle and optax's."""

import math

import jax
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.common import assert_close
from tests.reference import folds
from tests.reference.factored_rms import factored_rms
from tests.transforms.samples import run

RULES = fj.LeafRules(min_dim_size=8, max_aspect_ratio=math.inf)


def test_equals_adafactor():
    gradients = folds.gradients(6)
    updates, _ = run(fj.scale_by_factored_rms(rules=RULES), gradients)
    for name in folds.SHAPES:
        stacks = [folds.fold(name, g[name]) for g in gradients]
        slices = [factored_rms(matrices) for matrices in zip(*stacks, strict=True)]
        expected = [np.stack(u) for u in zip(*slices, strict=True)]
        assert_close([folds.fold(name, u[name]) for u in updates], expected, "float32")


@pytest.mark.sample(1)
@pytest.mark.parametrize("decay_rate", [0.5, 0.8])
def test_equals_optax_where_both_factor_the_same_axes(decay_rate):
    """And on the folded leaf where optax would not fold."""
    gradients = folds.gradients(5)
    bias = np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32)
    gradients = [
        {**g, "bias": b, "scalar": b[0]} for g, b in zip(gradients, bias, strict=True)
    ]
    folded = [{**g, "cut": g["cut"].reshape(16, 32)} for g in gradients]
    tx = fj.scale_by_factored_rms(decay_rate, rules=RULES)
    peer = optax.scale_by_factored_rms(
        decay_rate=decay_rate, min_dim_size_to_factor=8, epsilon=1e-30
    )
    updates, ours = run(tx, gradients)
    expected, theirs = run(peer, folded, folded[0])
    for update, reference in zip(updates, expected, strict=True):
        folded_update = {**update, "cut": update["cut"].reshape(16, 32)}
        assert_close(folded_update, reference)
    for field in ("v_row", "v_col"):
        for name in folds.SHAPES:
            moment, reference = getattr(ours, field), getattr(theirs, field)[name]
            assert moment[name].ndim == gradients[0][name].ndim
            assert_close(moment[name].ravel(), reference.ravel())
    assert_close(ours.v["bias"], theirs.v["bias"])
    assert int(ours.count) == 5


def test_epsilon_keeps_a_zero_gradient_at_zero():
    gradients = [{"w": np.zeros((16, 24), np.float32), "b": np.zeros(3, np.float32)}]
    tx = fj.scale_by_factored_rms(rules=RULES)
    for leaf in jax.tree.leaves(run(tx, 2 * gradients)):
        assert np.isfinite(leaf).all()
    assert not run(tx, gradients)[0][0]["w"].any()
