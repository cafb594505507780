"""The project's models: no kernel's gradient is formed, and the update is the same."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from experiments.models import build
from experiments.models.config import GPT2Config, LlamaConfig, T5Config
from tests.transforms.samples import case_id

SKETCH = fj.Sketch(4, key=5, mask=fj.not_embeddings, min_dim_size=8)
SIZES = {"width": 16, "heads": 2, "vocab_size": 300}
MODELS = {
    "gpt2": GPT2Config(layers=2, context=32, **SIZES),
    "llama": LlamaConfig(layers=2, hidden=32, kv_heads=1, context=32, **SIZES),
    "t5": T5Config(layers=2, decoder_layers=2, head_width=8, hidden=32, **SIZES),
}
VARIANTS = {
    "plain": {},
    "scan": {"scan": True, "dtype": "bfloat16"},
    "remat": {"remat": True, "dtype": "bfloat16"},
    "both": {"scan": True, "remat": True, "dropout": 0.1},
}
PROJECTIONS = [
    fj.CountSketch(),
    fj.Gaussian(),
    fj.Rademacher(),
    fj.Orthogonal(),
    fj.SRHT(),
]


def problem(name, variant, **changes):
    """A loss of parameters and tokens, the parameters, and three batches."""
    config = dataclasses.replace(MODELS[name], **(VARIANTS[variant] | changes))
    graphdef, params = build.create(config, 0)
    key = jax.random.key(1) if config.dropout else None
    names = ["source", "target"] if name == "t5" else ["tokens"]

    def loss(params, tokens):
        batch = dict.fromkeys(names, tokens)
        return build.mean_loss(graphdef, params, batch, key)

    return loss, params, np.random.default_rng(1).integers(1, 300, (3, 2, 9))


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(
            *case, marks=[] if case == ("gpt2", "both") else [pytest.mark.full]
        )
        for case in itertools.product(MODELS, VARIANTS)
    ],
)
def test_no_kernel_falls_back(name, variant):
    loss, params, tokens = problem(name, variant)
    reports = fj.explain_sketched_gradients(loss, SKETCH)(params, tokens[0])
    # The mask leaves out a Llama's head.
    blocks = [r for r in reports if not r.path.startswith("lm_head")]
    kernels = [r for r in blocks if r.path.endswith("kernel")]
    assert len(kernels) >= 4
    for report in kernels:
        assert report.sketched_during_backpropagation, report
    assert {r.path for r in reports if r.dense_reason is None} <= {
        r.path for r in kernels
    }


def assert_same_update(
    name, variant, projection, tolerance, cycles=2, sketch=SKETCH, **changes
):
    """After cycles of two micro-steps: parameters, inner state, accumulator."""
    loss, params, tokens = problem(name, variant, **changes)
    sketch = dataclasses.replace(sketch, projection=projection)
    tx = fj.compressed_accumulation(optax.sgd(0.3, momentum=0.9), 2, sketch)

    def sketched(params, state, x):
        return fj.sketched_value_and_grad(loss, sketch)(state, params, x)

    def full(params, state, x):
        return jax.value_and_grad(loss)(params, x)

    ends = []
    for gradient in (sketched, full):

        def step(params, state, x, gradient=gradient):
            value, grads = gradient(params, state, x)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        now, state, compiled = params, tx.init(params), jax.jit(step)
        for x in (*tokens, tokens[0])[: 2 * cycles]:
            now, state, value = compiled(now, state, x)
        assert int(state.gradient_step) == cycles
        ends.append((jax.tree.map(jnp.subtract, now, params), state, value))
    assert jax.tree.structure(ends[0]) == jax.tree.structure(ends[1])
    (moved, state, value), (expected, other, theirs) = ends
    np.testing.assert_allclose(value, theirs, rtol=tolerance)
    for ours, full in ((moved, expected), (state, other)):
        named = jax.tree_util.tree_leaves_with_path(ours)
        for (path, x), y in zip(named, jax.tree.leaves(full), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            if jnp.issubdtype(x.dtype, jnp.floating):
                x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
                size = np.linalg.norm(y)
                assert np.linalg.norm(x - y) <= tolerance * size, (path, size)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "projection"),
    [("gpt2", fj.CountSketch()), ("t5", fj.CountSketch()), ("gpt2", fj.Gaussian())],
    ids=case_id,
)
def test_the_update_is_that_of_full_gradients(name, projection):
    layers = {"layers": 1} | ({"decoder_layers": 1} if name == "t5" else {})
    assert_same_update(name, "plain", projection, 2e-5, **layers)


@pytest.mark.full
@pytest.mark.parametrize("variant", ["plain", "scan"])
def test_the_update_where_activations_are_sketched(variant):
    """Queries, keys and values read the same ones, and so do gate and up."""
    groups = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
    sketch = dataclasses.replace(SKETCH, side="left", same_projection=groups)
    changes = {"sketch": sketch, "dtype": "float32"}
    assert_same_update("llama", variant, fj.CountSketch(), 2e-5, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("projection", PROJECTIONS, ids=case_id)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_the_update_is_that_of_full_gradients_for_all(name, variant, projection):
    """A full gradient is rounded to bfloat16 before it is sketched, ours after.

    What that does to one update, at most 0.5%, is a tenth of what bfloat16 itself does
    to it (4% on average, up to 23% of a leaf); in the next cycle the losses differ.
    """
    if VARIANTS[variant].get("dtype") == "bfloat16":
        assert_same_update(name, variant, projection, 0.01, cycles=1)
    else:
        assert_same_update(name, variant, projection, 2e-5)


@pytest.mark.full
def test_a_block_takes_a_fifth_fewer_operations():
    """By XLA's count, with ranks that are small enough."""
    config = GPT2Config(layers=1, width=128, heads=4, context=160, vocab_size=16)
    graphdef, params = jax.eval_shape(lambda: build.create(config, 0))
    tokens = jax.ShapeDtypeStruct((1, 161), jnp.int32)

    def loss(p, tokens):
        return build.mean_loss(graphdef, p, {"tokens": tokens})

    def count(fun):
        return jax.jit(fun).lower(params, tokens).compile()

    def products(compiled):
        text = re.findall(r"= f32\[([\d,]+)\]\S* ([\w-]+)\(", compiled.as_text())
        return {shape for shape, op in text if op in ("dot", "convolution")}

    full = count(jax.value_and_grad(loss))
    # No kernel's gradient is anywhere; x and dx have other shapes at 160 tokens.
    kernels = {"128,384", "128,128", "128,512", "512,128", "384,128"}
    assert len(products(full) & kernels) >= 4
    for projection, rank in ((fj.CountSketch(), 16), (fj.Gaussian(), 8)):
        sketch = fj.Sketch(rank, projection=projection)
        gradient = fj.sketched_value_and_grad(loss, sketch)
        ours = count(lambda p, t, f=gradient, s=sketch: f(s.cycle(0), p, t)[1].tree)
        flops = [c.cost_analysis()["flops"] for c in (ours, full)]
        assert flops[0] < 0.8 * flops[1], flops
        assert not products(ours) & kernels
