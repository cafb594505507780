"""Scan, rematerialization, bfloat16 and dropout change what they say, and no more."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models import blocks, build
from experiments.models.config import DecoderConfig
from tests.experiments.models.tiny import CONFIGS, batch_of, by_path, randomized

pytestmark = pytest.mark.full

every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def loss_and_gradients(config, params, key):
    graphdef = build.create(config, 0)[0]
    batch = batch_of(config)
    loss = jax.jit(
        jax.value_and_grad(lambda p: build.mean_loss(graphdef, p, batch, key))
    )
    return loss(params)


def assert_close(one, other, atol=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), one, other
    )


@every_model
def test_scan_and_remat_change_nothing(config):
    key = jax.random.key(4)
    config = dataclasses.replace(config, dropout=0.2, layers=2)
    params = randomized(build.create(config, 0)[1])
    expected = loss_and_gradients(config, params, key)
    recomputed = dataclasses.replace(config, remat=True)
    assert_close(loss_and_gradients(recomputed, params, key), expected)
    scanned = dataclasses.replace(config, scan=True, remat=True)
    loss, gradients = loss_and_gradients(scanned, blocks.stack(params), key)
    assert_close((loss, blocks.unstack(gradients)), expected)


@every_model
def test_remat_recomputes(config):
    def recomputed(remat):
        chosen = dataclasses.replace(config, remat=remat)
        graphdef, params = build.create(chosen, 0)
        program = jax.make_jaxpr(
            lambda p: build.mean_loss(graphdef, p, batch_of(config))
        )(params)
        return sum("prevent_cse" in eqn.params for eqn in program.eqns)

    blocks_there = config.layers + getattr(config, "decoder_layers", 0)
    assert recomputed(True) == blocks_there
    # Norms, attention and activation functions, each by itself.
    assert recomputed(False) > 2 * blocks_there


@every_model
def test_scan_stacks_the_same_numbers(config):
    params = build.create(config, 3)[1]
    scanned = build.create(dataclasses.replace(config, scan=True), 3)[1]
    jax.tree.map(np.testing.assert_array_equal, scanned, blocks.stack(params))
    jax.tree.map(np.testing.assert_array_equal, blocks.unstack(scanned), params)
    kernels = {
        "GPT2Config": "h/attn/c_attn/kernel",
        "LlamaConfig": "layers/mlp/up_proj/kernel",
        "T5Config": "encoder/block/layer/0/SelfAttention/q/kernel",
    }
    path = kernels[type(config).__name__]
    assert by_path(scanned)[path].shape[0] == config.layers


@every_model
@pytest.mark.parametrize("scan", [False, True])
def test_bfloat16_computes_in_bfloat16(config, scan):
    config = dataclasses.replace(config, scan=scan)
    low = dataclasses.replace(config, dtype="bfloat16")
    graphdef, params = build.create(low, 0)
    params = randomized(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    batch = batch_of(config)
    program = jax.make_jaxpr(lambda p: build.token_losses(graphdef, p, batch)[0])
    lines = str(program(params)).splitlines()
    products = [line for line in lines if "dot_general[" in line]
    # Scores and logits are float32; nothing else is.
    kinds = {line.split("=")[0].split(":")[1].split("[")[0] for line in products}
    assert kinds == {"bf16", "f32"}
    losses, _ = build.token_losses(graphdef, params, batch)
    exact, _ = build.token_losses(build.create(config, 0)[0], params, batch)
    assert losses.dtype == jnp.float32
    error = np.abs(losses - exact).max()
    assert 1e-4 < error < 0.3


@every_model
def test_dropout(config):
    config = dataclasses.replace(config, dropout=0.3)
    graphdef, params = build.create(config, 0)
    batch = batch_of(config)

    @jax.jit
    def loss(key):
        return build.mean_loss(graphdef, params, batch, key)

    keys = jax.random.split(jax.random.key(0), 2)
    assert loss(keys[0]) == loss(keys[0])
    assert loss(keys[0]) != loss(keys[1])
    without = build.create(dataclasses.replace(config, dropout=0.0), 0)[0]
    plain = build.mean_loss(without, params, batch)
    assert loss(None) == pytest.approx(float(plain), rel=1e-6)
    same = build.mean_loss(without, params, batch, keys[0])
    assert float(same) == pytest.approx(float(plain), rel=1e-6)


def test_dropout_keeps_the_mean():
    x = jnp.ones(20_000)
    dropped = blocks.dropout(x, 0.25, jax.random.key(1))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    # Each number has variance 0.25 / 0.75.
    assert abs(float(dropped.mean()) - 1) < 5 * (1 / 3 / 20_000) ** 0.5


@every_model
def test_layers_have_masks_of_their_own(config):
    # With one key for all layers, equal layers would drop the same places.
    config = dataclasses.replace(config, dropout=0.5)
    model = nnx.merge(*build.create(config, 0))
    is_decoder = isinstance(config, DecoderConfig)
    stacked = model._blocks if is_decoder else model.encoder.block
    seen = []

    def apply(block, x, key):
        seen.append(jax.random.key_data(key))
        return x, None

    keys = jax.random.split(jax.random.key(0), config.layers)
    blocks.run(stacked, apply, jnp.zeros(1), (keys,))
    assert len(np.unique(seen, axis=0)) == config.layers


@every_model
@pytest.mark.parametrize("part", [1, 1000])
def test_attention_and_logits_in_parts(config, part, monkeypatch):
    params = randomized(build.create(config, 1)[1])
    expected = loss_and_gradients(config, params, None)
    counts = []

    def count(length, elements):
        counts.append(real(length, elements))
        return counts[-1]

    real = blocks._count
    monkeypatch.setattr(blocks, "_count", count)
    monkeypatch.setattr(blocks, "PART", part)
    assert_close(loss_and_gradients(config, params, None), expected)
    assert max(counts) > 1


def test_parts_of_positions(monkeypatch):
    monkeypatch.setattr(blocks, "PART", 4096)
    # 1, 2 and 8 of at most 4096 bytes; a prime length has parts of one position alone.
    assert [blocks._count(64, n) for n in (16, 32, 100)] == [1, 2, 8]
    assert blocks._count(61, 32) == 61
