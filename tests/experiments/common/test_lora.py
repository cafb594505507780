"""Adapters: where they are, and that they are what the paper says."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util

from experiments.common import lora
from experiments.models.build import create, token_losses
from experiments.models.config import GPT2Config, T5Config

RANK, ALPHA = 4, 8.0
GPT2 = GPT2Config(layers=2, width=32, heads=2, context=16, vocab_size=50)
T5 = T5Config(
    layers=2, decoder_layers=2, width=32, head_width=8, hidden=64, vocab_size=50
)
MODELS = {
    "gpt2": GPT2,
    "gpt2-scan": dataclasses.replace(GPT2, scan=True),
    "t5": T5,
    "t5-gated-scan": dataclasses.replace(T5, scan=True, gated=True, tied=False),
}


def batch_of(config):
    tokens = np.random.default_rng(0).integers(1, 50, (2, 9))
    if isinstance(config, GPT2Config):
        return {"tokens": tokens}
    return {"source": tokens, "target": tokens[:, :6]}


def with_adapters(config):
    """Model and parameters with adapters that do something."""
    graphdef, params = create(config, 0)
    adapted, full = lora.add(graphdef, params, RANK, ALPHA, 1)
    flat = traverse_util.flatten_dict(full)
    rng = np.random.default_rng(1)
    for path, leaf in flat.items():
        if path[-1] == "lora_b":
            flat[path] = np.float32(0.1 * rng.normal(size=leaf.shape))
    return graphdef, params, adapted, full, traverse_util.unflatten_dict(flat)


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_starts_as_the_model_without(name):
    config = MODELS[name]
    graphdef, params, adapted, full, _ = with_adapters(config)
    batch = batch_of(config)
    np.testing.assert_array_equal(
        token_losses(adapted, full, batch)[0], token_losses(graphdef, params, batch)[0]
    )


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_merged_is_the_same_function(name):
    config = MODELS[name]
    graphdef, params, adapted, _, changed = with_adapters(config)
    batch = batch_of(config)
    merged = lora.merge(changed, RANK, ALPHA)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    with_, merged_, without = (
        token_losses(*model, batch)[0]
        for model in ((adapted, changed), (graphdef, merged), (graphdef, params))
    )
    np.testing.assert_allclose(with_, merged_, rtol=2e-4, atol=2e-4)
    assert np.abs(with_ - without).max() > 0.01


def test_is_the_papers_formula():
    linear = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    layer = lora.LoRALinear(linear, 2, 3.0, jax.random.key(0))
    layer.lora_b[...] = np.float32(np.random.default_rng(0).normal(size=(2, 5)))
    x = np.random.default_rng(1).normal(size=(4, 6))
    weights = np.float64(linear.kernel[...])
    update = np.float64(layer.lora_a[...]) @ np.float64(layer.lora_b[...])
    expected = x @ (weights + 3.0 * update) + np.float64(linear.bias[...])
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("name", "count"), [("gpt2", 8), ("gpt2-scan", 4), ("t5", 32)])
def test_every_matrix_but_the_head_has_an_adapter(name, count):
    *_, full = with_adapters(MODELS[name])
    flat = traverse_util.flatten_dict(full)
    assert sum(path[-1] == "lora_a" for path in flat) == count
    shape = {"gpt2-scan": (2, 32, RANK)}.get(name, (32, RANK))
    assert sum(leaf.shape == shape for leaf in flat.values()) >= count // 2


@pytest.mark.full
def test_adapters_are_sampled_apart_from_the_model():
    """Same seed: no kernel or embedding comes from the key of a matrix A."""
    graphdef, params = create(GPT2, 0)
    _, full = lora.add(graphdef, params, 32, 32.0, 0)  # A has a kernel's shape
    flat = traverse_util.flatten_dict(full)
    sampled = [np.ravel(x) for path, x in flat.items() if path[-1] == "lora_a"]
    others = [np.ravel(x) for path, x in flat.items() if path[-1] != "lora_a"]
    for i, a in enumerate(sampled):
        for b in (*others, *sampled[:i]):
            size = min(a.size, b.size)
            if b[:size].std() > 0 and size > 500:
                assert abs(np.corrcoef(a[:size], b[:size])[0, 1]) < 5 / size**0.5


@pytest.mark.full
@pytest.mark.parametrize("tune_rest", [False, True])
def test_divide_and_join(tune_rest):
    *_, full = with_adapters(MODELS["t5-gated-scan"])
    trained, frozen = lora.divide(full, tune_rest=tune_rest)
    joined = lora.join(trained, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(full)
    jax.tree.map(np.testing.assert_array_equal, joined, full)
    names = {path[-1] for path in traverse_util.flatten_dict(trained)}
    assert names >= {"lora_a", "lora_b"}
    assert (len(names) > 2) == tune_rest
    kernels = traverse_util.flatten_dict(frozen)
    assert all(path[-2:] == ("base", "kernel") for path in kernels) == tune_rest
