"""Sketched accumulation around the optimizers of optax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj

OPTIMIZERS = {
    "adabelief": lambda: optax.adabelief(1e-3),
    "adadelta": lambda: optax.adadelta(1e-3),
    "adafactor": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=8),
    "adafactor-momentum": lambda: optax.adafactor(1e-3, momentum=0.9),
    "adagrad": lambda: optax.adagrad(1e-3),
    "adam": lambda: optax.adam(1e-3),
    "adamax": lambda: optax.adamax(1e-3),
    "adamw": lambda: optax.adamw(1e-3),
    "adan": lambda: optax.adan(1e-3),
    "amsgrad": lambda: optax.amsgrad(1e-3),
    "fromage": lambda: optax.fromage(1e-3),
    "lamb": lambda: optax.lamb(1e-3),
    "lars": lambda: optax.lars(1e-3),
    "lion": lambda: optax.lion(1e-3),
    "nadam": lambda: optax.nadam(1e-3),
    "noisy_sgd": lambda: optax.noisy_sgd(1e-3, key=0),
    "noisy_sgd-typed": lambda: optax.noisy_sgd(1e-3, key=jax.random.key(0)),
    "novograd": lambda: optax.novograd(1e-3),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(1e-3),
    "optimistic_adam_v2": lambda: optax.optimistic_adam_v2(1e-3),
    "radam": lambda: optax.radam(1e-3),
    "rmsprop": lambda: optax.rmsprop(1e-3),
    "rprop": lambda: optax.rprop(1e-3),
    "sgd-injected": lambda: optax.inject_hyperparams(optax.sgd)(1e-3, momentum=0.9),
    "sgd-nesterov": lambda: optax.sgd(1e-3, momentum=0.9, nesterov=True),
    "sm3": lambda: optax.sm3(1e-3),
    "yogi": lambda: optax.yogi(1e-3),
}


@dataclasses.dataclass(frozen=True)
class Selection(fj.ObliviousProjection):
    """Keeps the first r columns or rows: a projection that compiles in no time."""

    def sample(self, key, rank, width):
        return key

    def compress(self, sampled, matrix, rank, axis, weights=None):
        assert weights is None
        kept = jax.lax.slice_in_dim(matrix, 0, rank, axis=axis % matrix.ndim)
        return kept.astype(jnp.float32)

    def expand(self, sampled, sketch, width, axis):
        pad = [(0, 0)] * sketch.ndim
        pad[axis] = (0, width - sketch.shape[axis])
        return jnp.pad(sketch, pad)

    def as_matrix(self, sampled, rank, width):
        return jnp.eye(rank, width)

    def gram_diagonal(self, rank, width):
        return jnp.ones(rank)


def signature(tree):
    """Path, shape, dtype and weak type of each leaf."""
    return [
        (
            jax.tree_util.keystr(path),
            leaf.shape,
            leaf.dtype,
            getattr(leaf, "weak_type", False),  # Typed keys have none.
        )
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def train(tx, params, dtype):
    """Seven micro-steps in a scan: the states before and after, and the updates."""
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=(7, *x.shape)), dtype), params
    )
    before = params, tx.init(params)

    @jax.jit
    def scan(carry, gradients):
        def step(carry, gradient):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(step, carry, gradients)

    return before, *scan(before, gradients)


def accumulation(inner):
    sketch = fj.Sketch(2, Selection("unbiased"), min_dim_size=8)
    return fj.compressed_accumulation(inner, 3, sketch)


def ones(dtype):
    return {"w": jnp.ones((8, 12), dtype), "b": jnp.ones(4, dtype)}


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inner_in_a_scan_of_micro_steps(name, dtype):
    tx = accumulation(OPTIMIZERS[name]())
    before, after, updates = train(tx, ones(dtype), dtype)
    assert before[1].acc_grads["w"].shape == (2, 12)
    assert signature(after) == signature(before)
    for key, update in updates.items():
        assert update.dtype == dtype
        values = np.asarray(update, np.float64)
        assert np.isfinite(values).all()
        moved = np.array([step.any() for step in values])
        assert moved[5], key  # rprop's first step is zero, before its signs are known.
        assert not moved[[0, 1, 3, 4, 6]].any(), key


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["adamw", "adan"])
@pytest.mark.parametrize(
    ("dtype", "of_gradients"),
    [(jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)],
)
def test_gradients_of_another_dtype_than_the_parameters(name, dtype, of_gradients):
    """Optax alone changes the state's dtype here, or that of the updates."""
    tx = accumulation(OPTIMIZERS[name]())
    before, after, updates = train(tx, ones(dtype), of_gradients)
    assert signature(after) == signature(before)
    assert {leaf.dtype for leaf in updates.values()} == {jnp.dtype(of_gradients)}


def test_weak_types_in_the_state_of_inner():
    inner = optax.GradientTransformation(
        lambda params: jnp.asarray(0.5),
        lambda updates, state, params=None: (updates, state + jnp.float32(1)),
    )
    assert inner.init(None).weak_type
    before, after, _ = train(accumulation(inner), ones(jnp.float32), jnp.float32)
    # A checkpoint has none either: a restored state must not compile anew.
    assert not before[1].inner_opt_state.weak_type
    assert signature(after) == signature(before)
    assert float(after[1].inner_opt_state) == 2.5
