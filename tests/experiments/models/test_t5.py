"""What is T5's own; its numbers are compared in test_fixtures and test_transformers."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.models import build
from experiments.models.config import T5Config
from experiments.models.t5 import bucket_of
from tests.experiments.models.tiny import T5, T5_GATED, batch_of, by_path, randomized

pytestmark = pytest.mark.full


def test_initial_scales():
    config = T5Config(tied=False, gated=True)
    leaves = by_path(build.create(config, 0)[1])
    expected = {
        "shared/embedding": 1.0,
        "lm_head/kernel": 128**-0.5,
        "encoder/relative_attention_bias/embedding": 128**-0.5,
        "encoder/block/1/layer/0/SelfAttention/q/kernel": (128 * 32) ** -0.5,
        "decoder/block/0/layer/1/EncDecAttention/k/kernel": 128**-0.5,
        "decoder/block/0/layer/1/EncDecAttention/v/kernel": 128**-0.5,
        "decoder/block/1/layer/0/SelfAttention/o/kernel": (4 * 32) ** -0.5,
        "encoder/block/0/layer/1/DenseReluDense/wi_0/kernel": 128**-0.5,
        "decoder/block/0/layer/2/DenseReluDense/wi_1/kernel": 128**-0.5,
        "decoder/block/0/layer/2/DenseReluDense/wo/kernel": 512**-0.5,
    }
    for path, deviation in expected.items():
        # The relative bias has only 128 numbers: 5 standard errors of 1 / sqrt(2 n).
        rel = 5 / np.sqrt(2 * leaves[path].size)
        assert float(leaves[path].std()) == pytest.approx(deviation, rel=rel)


def test_buckets_by_hand():
    def buckets(offsets, both_directions):
        return bucket_of(
            np.array(offsets),
            both_directions=both_directions,
            buckets=32,
            max_distance=128,
        ).tolist()

    # Decoder: 0 to 15 are exact; 16 (128 / 16)^(i / 16) begins bucket 16 + i.
    offsets = [3, 0, -1, -15, -16, -18, -19, -20, -21, -112, -113, -128, -1000]
    expected = [0, 0, 1, 15, 16, 16, 17, 17, 18, 30, 31, 31, 31]
    assert buckets(offsets, both_directions=False) == expected
    # Encoder: 8 (128 / 8)^(i / 8) begins bucket 8 + i, which for even i is a power of
    # two times 8; what comes after has 16 more.
    offsets = [0, -7, -8, -11, -12, -15, -16, -31, -32, -63, -64, -127, -500]
    expected = [0, 7, 8, 8, 9, 9, 10, 11, 12, 13, 14, 15, 15]
    assert buckets(offsets, both_directions=True) == expected
    later = [16 + bucket for bucket in expected[1:]]
    assert buckets([-x for x in offsets[1:]], both_directions=True) == later


@pytest.mark.parametrize("config", [T5, T5_GATED])
def test_padding_and_later_targets_do_not_matter(config):
    graphdef, params = build.create(config, 0)
    params = randomized(params)
    model = nnx.merge(graphdef, params)
    batch = batch_of(config)
    logits = model.logits(model.training(batch)[0])
    longer = {
        "source": np.pad(batch["source"], ((0, 0), (0, 3))),
        "target": np.pad(batch["target"], ((0, 0), (0, 2)), constant_values=9),
    }
    other = model.logits(model.training(longer)[0])[:, :12]
    np.testing.assert_allclose(logits, other, rtol=0, atol=2e-5)
    changed = batch["source"].copy()
    changed[:, 0] = 47 - changed[:, 0]
    moved = model.logits(model.training(batch | {"source": changed})[0])
    assert (np.abs(logits - moved).max(axis=(1, 2)) > 1e-3).all()


def test_losses_weigh_padding_zero():
    model = build.create(T5, 0)
    batch = batch_of(T5)
    target = batch["target"]
    shifted = np.concatenate([np.zeros((3, 1), int), target[:, :-1]], axis=1)
    logits = np.float64(nnx.merge(*model)(batch["source"], shifted))
    log_sums = np.log(np.exp(logits).sum(axis=-1))
    chosen = np.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    losses, weights = build.token_losses(*model, batch)
    np.testing.assert_allclose(losses, log_sums - chosen, rtol=1e-4)
    np.testing.assert_array_equal(weights, target != 0)
    assert (target == 0).any()
    expected = np.average(log_sums - chosen, weights=target != 0)
    assert float(build.mean_loss(*model, batch)) == pytest.approx(expected, rel=1e-5)


def test_every_parameter_has_a_gradient():
    for config in (T5, T5_GATED):
        graphdef, params = build.create(config, 0)
        loss = jax.jit(jax.grad(build.mean_loss, argnums=1))
        gradients = by_path(loss(graphdef, params, batch_of(config)))
        assert [path for path, leaf in gradients.items() if not leaf.any()] == []
