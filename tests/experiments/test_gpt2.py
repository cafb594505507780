"""The model is GPT-2: its names, shapes and numbers."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import gpt2, state_bytes
from experiments.config import Config, ModelConfig
from tests.experiments.job import TINY

SMALL = ModelConfig(layers=12, width=768, heads=12, context=1024, vocab_size=50257)

# As `GPT2Model` of the transformers library lists them, for one block.
HUGGING_FACE = {
    "wte.weight": (50257, 768),
    "wpe.weight": (1024, 768),
    "h.0.ln_1.weight": (768,),
    "h.0.ln_1.bias": (768,),
    "h.0.attn.c_attn.weight": (768, 2304),
    "h.0.attn.c_attn.bias": (2304,),
    "h.0.attn.c_proj.weight": (768, 768),
    "h.0.attn.c_proj.bias": (768,),
    "h.0.ln_2.weight": (768,),
    "h.0.ln_2.bias": (768,),
    "h.0.mlp.c_fc.weight": (768, 3072),
    "h.0.mlp.c_fc.bias": (3072,),
    "h.0.mlp.c_proj.weight": (3072, 768),
    "h.0.mlp.c_proj.bias": (768,),
    "ln_f.weight": (768,),
    "ln_f.bias": (768,),
}


def abstract_params(config):
    return jax.eval_shape(lambda: gpt2.create(config, 0)[1])


def by_path(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


@pytest.fixture(scope="module")
def model():
    return gpt2.create(TINY.model, 0)


def test_names_and_shapes_are_hugging_faces():
    found = {
        gpt2.hugging_face_name(path): leaf.shape
        for path, leaf in by_path(abstract_params(SMALL)).items()
    }
    first_block = {
        name: shape
        for name, shape in found.items()
        if not name.startswith("h.") or name.startswith("h.0.")
    }
    assert first_block == HUGGING_FACE
    assert len(found) == 4 + 12 * 12


def test_parameter_count():
    for config in (SMALL, Config().model):
        leaves = jax.tree.leaves(abstract_params(config))
        assert sum(leaf.size for leaf in leaves) == gpt2.parameter_count(config)
    assert gpt2.parameter_count(SMALL) == 124_439_808  # GPT-2 small


def test_default_job_is_no_toy():
    config = Config()
    plans = state_bytes.leaf_plans(config, abstract_params(config.model))
    compressed = [plan for plan in plans if plan.dense_reason is None]
    share = sum(np.prod(plan.shape) for plan in compressed)
    assert share / gpt2.parameter_count(config.model) >= 0.7
    assert config.model.width >= 256
    assert config.model.layers >= 4
    assert config.updates >= 200
    assert {plan.width / plan.rank for plan in compressed} == {8}
    assert not any(plan.path.startswith(("wte", "wpe")) for plan in compressed)


def test_initial_scales(model):
    leaves = by_path(model[1])
    deviations = {path: float(leaf.std()) for path, leaf in leaves.items()}
    residual = 0.02 / np.sqrt(2 * TINY.model.layers)
    for path in ("wte/embedding", "h/0/attn/c_attn/kernel", "h/0/mlp/c_fc/kernel"):
        assert deviations[path] == pytest.approx(0.02, rel=0.05)
    for path in ("h/0/attn/c_proj/kernel", "h/0/mlp/c_proj/kernel"):
        assert deviations[path] == pytest.approx(residual, rel=0.05)
    for path, leaf in leaves.items():
        if path.endswith(("bias", "scale")):
            np.testing.assert_array_equal(leaf, float(path.endswith("scale")))


def test_later_tokens_do_not_change_earlier_logits(model):
    tokens = np.arange(2 * 16).reshape(2, 16) % 300
    changed = tokens.copy()
    changed[:, 9] = 299
    logits, other = (jax.jit(nnx.merge(*model))(t) for t in (tokens, changed))
    assert logits.shape == (2, 16, 300)
    np.testing.assert_array_equal(logits[:, :9], other[:, :9])
    assert (np.abs(logits - other)[:, 9:].max(axis=-1) > 1e-6).all()


def test_logits_are_those_of_the_formulas(model):
    graphdef, params = model
    rng = np.random.default_rng(0)
    # Biases and norms start at constants, which would hide a mistake.
    params = jax.tree.map(
        lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), params
    )
    tokens = rng.integers(0, 300, (2, 16))
    logits = nnx.merge(graphdef, params)(tokens)
    weights = {path: np.float64(leaf) for path, leaf in by_path(params).items()}
    expected = np.stack([reference_logits(weights, row) for row in tokens])
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4)


def reference_logits(weights, tokens):
    """GPT-2 in NumPy, for tokens (T,), one head and one position at a time."""
    heads = TINY.model.heads
    x = weights["wte/embedding"][tokens] + weights["wpe/embedding"][: len(tokens)]
    for i in range(TINY.model.layers):
        block = {
            path.removeprefix(f"h/{i}/"): leaf
            for path, leaf in weights.items()
            if path.startswith(f"h/{i}/")
        }
        qkv = linear(block, "attn/c_attn", norm(block, "ln_1", x))
        q, k, v = (np.split(part, heads, axis=1) for part in np.split(qkv, 3, axis=1))
        mixed = np.zeros_like(x)
        for t in range(len(x)):
            outs = []
            for h in range(heads):
                scores = k[h][: t + 1] @ q[h][t] / np.sqrt(q[h].shape[1])
                weight = np.exp(scores - scores.max())
                outs.append(weight / weight.sum() @ v[h][: t + 1])
            mixed[t] = np.concatenate(outs)
        x = x + linear(block, "attn/c_proj", mixed)
        hidden = linear(block, "mlp/c_fc", norm(block, "ln_2", x))
        cubic = np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)
        gelu = 0.5 * hidden * (1 + np.tanh(cubic))
        x = x + linear(block, "mlp/c_proj", gelu)
    return norm(weights, "ln_f", x) @ weights["wte/embedding"].T


def linear(weights, name, x):
    return x @ weights[f"{name}/kernel"] + weights[f"{name}/bias"]


def norm(weights, name, x):
    centred = x - x.mean(axis=1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}/scale"] + weights[f"{name}/bias"]


def test_loss_is_the_mean_cross_entropy(model):
    tokens = np.random.default_rng(1).integers(0, 300, (3, 17))
    logits = np.float64(nnx.merge(*model)(tokens[:, :-1]))
    log_sums = np.log(np.exp(logits).sum(axis=-1))
    chosen = np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    loss = gpt2.next_token_loss(*model, tokens)
    assert float(loss) == pytest.approx((log_sums - chosen).mean(), rel=1e-5)
