"""The model is GPT-2: its names, shapes and numbers."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.models import build, decode
from experiments.models.config import GPT2Config
from tests.experiments.models.tiny import GPT2, by_path, prompts_of, randomized


@pytest.fixture(scope="module")
def model():
    return build.create(GPT2, 0)


@pytest.mark.full
def test_initial_scales():
    config = GPT2Config(layers=2, width=128, heads=2, vocab_size=300)
    leaves = by_path(build.create(config, 0)[1])
    deviations = {path: float(leaf.std()) for path, leaf in leaves.items()}
    residual = 0.02 / np.sqrt(2 * config.layers)
    for path in ("wte/embedding", "h/0/attn/c_attn/kernel", "h/0/mlp/c_fc/kernel"):
        assert deviations[path] == pytest.approx(0.02, rel=0.05)
    for path in ("h/0/attn/c_proj/kernel", "h/0/mlp/c_proj/kernel"):
        assert deviations[path] == pytest.approx(residual, rel=0.05)
    for path, leaf in leaves.items():
        if path.endswith(("bias", "scale")):
            np.testing.assert_array_equal(leaf, float(path.endswith("scale")))


@pytest.mark.full
def test_later_tokens_do_not_change_earlier_logits(model):
    tokens = np.arange(2 * 16).reshape(2, 16) % 48
    changed = tokens.copy()
    changed[:, 9] = 47
    logits, other = (
        jax.jit(lambda t: nnx.merge(*model)(t))(t) for t in (tokens, changed)
    )
    assert logits.shape == (2, 16, 48)
    np.testing.assert_array_equal(logits[:, :9], other[:, :9])
    assert (np.abs(logits - other)[:, 9:].max(axis=-1) > 1e-7).all()


def test_logits_are_those_of_the_formulas(model):
    graphdef, params = model
    rng = np.random.default_rng(0)
    params = randomized(params, scale=0.1)
    tokens = rng.integers(0, 48, (2, 16))
    logits = nnx.merge(graphdef, params)(tokens)
    weights = {path: np.float64(leaf) for path, leaf in by_path(params).items()}
    expected = np.stack([reference_logits(weights, row) for row in tokens])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def reference_logits(weights, tokens):
    """GPT-2 in NumPy, for tokens (T,), one head and one position at a time."""
    x = weights["wte/embedding"][tokens] + weights["wpe/embedding"][: len(tokens)]
    for i in range(GPT2.layers):
        block = {
            path.removeprefix(f"h/{i}/"): leaf
            for path, leaf in weights.items()
            if path.startswith(f"h/{i}/")
        }
        x = x + reference_attention(block, norm(block, "ln_1", x))
        hidden = linear(block, "mlp/c_fc", norm(block, "ln_2", x))
        cubic = np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)
        gelu = 0.5 * hidden * (1 + np.tanh(cubic))
        x = x + linear(block, "mlp/c_proj", gelu)
    return norm(weights, "ln_f", x) @ weights["wte/embedding"].T


def reference_attention(block, x):
    heads = GPT2.heads
    qkv = np.split(linear(block, "attn/c_attn", x), 3, axis=1)
    q, k, v = (np.split(part, heads, axis=1) for part in qkv)
    mixed = np.zeros_like(x)
    for t in range(len(x)):
        outs = []
        for h in range(heads):
            scores = k[h][: t + 1] @ q[h][t] / np.sqrt(q[h].shape[1])
            weight = np.exp(scores - scores.max())
            outs.append(weight / weight.sum() @ v[h][: t + 1])
        mixed[t] = np.concatenate(outs)
    return linear(block, "attn/c_proj", mixed)


def linear(weights, name, x):
    return x @ weights[f"{name}/kernel"] + weights[f"{name}/bias"]


def norm(weights, name, x):
    centered = x - x.mean(axis=1, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(axis=1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}/scale"] + weights[f"{name}/bias"]


@pytest.mark.full
def test_norm_survives_a_large_mean(model):
    graphdef, params = model
    norm_of = nnx.merge(graphdef, params).ln_f
    x = np.float32(3000 + np.random.default_rng(0).normal(size=(1, 1, 16)))
    exact = np.float64(x) - np.float64(x).mean()
    exact /= np.sqrt((exact**2).mean() + 1e-5)
    np.testing.assert_allclose(norm_of(x), exact, rtol=0, atol=1e-3)


@pytest.mark.full
def test_losses_are_cross_entropies(model):
    tokens = np.random.default_rng(1).integers(0, 48, (3, 17))
    weights = np.float32(np.random.default_rng(2).random((3, 16)))
    logits = np.float64(nnx.merge(*model)(tokens[:, :-1]))
    log_sums = np.log(np.exp(logits).sum(axis=-1))
    chosen = np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    losses, ones = build.token_losses(*model, {"tokens": tokens})
    np.testing.assert_allclose(losses, log_sums - chosen, rtol=1e-5)
    np.testing.assert_array_equal(ones, np.ones((3, 16)))
    batch = {"tokens": tokens, "weights": weights}
    expected = np.average(log_sums - chosen, weights=weights)
    assert float(build.mean_loss(*model, batch)) == pytest.approx(expected, rel=1e-5)
    assert build.mean_loss(*model, batch | {"weights": 0 * weights}) == 0
    # Of some labels, the same as of all with the others' weights at 0.
    first = np.int32([0, 5, 12])
    some = {"tokens": tokens, "first": first, "weights": weights[:, :4]}
    every = np.zeros_like(weights)
    for row, start in enumerate(first):
        every[row, start : start + 4] = weights[row, :4]
    expected = build.mean_loss(*model, batch | {"weights": every})
    np.testing.assert_allclose(build.mean_loss(*model, some), expected, rtol=1e-6)


def test_prompt_and_tokens_must_fit_the_context(model):
    with pytest.raises(ValueError, match="`length` must leave .* at most 17 fit"):
        decode.greedy(*model, prompts_of(GPT2), length=18, eos=1, pad=0)
