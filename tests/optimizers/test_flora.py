"""The paper's optimizer against its oracle, and against the chain that it names."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.common import assert_close, step_temporaries
from tests.reference import folds
from tests.reference.flora import flora as reference_flora
from tests.transforms.samples import case_id, sampled_matrix

SKETCH = fj.Sketch(4, min_dim_size=8, key=11)
FACTORED = fj.LeafRules(min_dim_size=8, max_aspect_ratio=math.inf)
WEIGHTS = {
    name: (0.3 * leaf).astype(np.float32)
    for name, leaf in folds.gradients(1, seed=9)[0].items()
}


def train(tx, gradients, params):
    """Updates of all steps, each applied before the next one is asked for."""
    step, state, outputs = jax.jit(tx.update), tx.init(params), []
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
        outputs.append(updates)
    return outputs


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("projection", "estimator", "side", "names"),
    [
        (fj.Gaussian(), "paper", "smaller", ("tall", "square", "stack")),
        (fj.CountSketch(), "nesterov", "larger", ("cut",)),
        (fj.CountSketch(), "residual", "smaller", ("wide",)),
    ],
    ids=case_id,
)
def test_equals_the_paper(projection, estimator, side, names):
    gradients = folds.gradients(8, names)
    params = {name: WEIGHTS[name] for name in names}
    rates = [0.1 / (t + 1) for t in range(len(gradients))]
    tx = fj.flora(
        lambda count: jnp.asarray(rates)[count],
        dataclasses.replace(
            SKETCH,
            rank={name: folds.RANKS[name] for name in names},
            projection=projection,
            side=side,
        ),
        b1=0.5,
        resample_every=3,
        estimator=estimator,
        weight_decay=0.2,
        clipping_threshold=0.9,
    )
    updates = train(tx, gradients, params)
    for name in names:
        expected = reference_flora(
            folds.fold(name, params[name]),
            [folds.fold(name, g[name]) for g in gradients],
            sampled_matrix(projection, 11, "compressed_momentum", name, side),
            rates.__getitem__,
            decay=0.5,
            resample_every=3,
            estimator=estimator,
            left=folds.left(name, side),
            clip=0.9,
            weight_decay=0.2,
        )
        assert_close([folds.fold(name, u[name]) for u in updates], expected, "float32")


PARAMS = {**WEIGHTS, "bias": np.full(16, 0.1, np.float32), "scalar": np.float32(0)}


def with_vectors(gradients):
    rng = np.random.default_rng(3)
    return [
        {
            **g,
            "bias": rng.normal(size=16).astype(np.float32),
            "scalar": np.float32(rng.normal()),
        }
        for g in gradients
    ]


@pytest.mark.full
def test_equals_the_chain_of_its_parts():
    gradients = with_vectors(folds.gradients(4, ("tall", "wide", "stack")))
    params = {name: PARAMS[name] for name in gradients[0]}
    mask = {name: name != "bias" for name in params}
    sketch = dataclasses.replace(
        SKETCH,
        projection=fj.CountSketch(),
        side="larger",
        mask=lambda path, shape: path != "wide",
        max_aspect_ratio=1.9,
    )
    tx = fj.flora(
        0.1,
        sketch,
        0.5,
        resample_every=3,
        estimator="residual",
        decay_rate=0.7,
        epsilon=1e-20,
        clipping_threshold=0.8,
        weight_decay=0.2,
        weight_decay_mask=mask,
    )
    chain = optax.chain(
        fj.scale_by_factored_rms(0.7, epsilon=1e-20, rules=FACTORED),
        optax.clip_by_block_rms(0.8),
        fj.compressed_momentum(0.5, sketch, resample_every=3, estimator="residual"),
        optax.scale_by_param_block_rms(),
        optax.add_decayed_weights(0.2, mask),
        optax.scale_by_learning_rate(0.1),
    )
    assert_close(train(tx, gradients, params), train(chain, gradients, params))
    ours, theirs = tx.init(params), chain.init(params)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    # The aspect ratio leaves out tall, the mask wide.
    shapes = {k: v.shape for k, v in ours[2].momentum.items()}
    assert {k for k in shapes if shapes[k] != PARAMS[k].shape} == {"stack"}


@pytest.mark.full
def test_parts_can_be_left_out():
    gradients = with_vectors(folds.gradients(3, ("wide",)))
    params = {name: PARAMS[name] for name in gradients[0]}
    tx = fj.flora(
        0.1,
        SKETCH,
        0.5,
        resample_every=3,
        clipping_threshold=None,
        multiply_by_parameter_scale=False,
    )
    chain = optax.chain(
        fj.scale_by_factored_rms(rules=FACTORED),
        fj.compressed_momentum(0.5, SKETCH, resample_every=3),
        optax.scale(-0.1),
    )
    assert_close(train(tx, gradients, params), train(chain, gradients, params))
    # Without a parameter scale and weight decay it does not ask for parameters.
    tx.update(gradients[0], tx.init(params))


def as_optax_folds(trees):
    """What optax factors as it is folded here."""
    return [{**tree, "cut": tree["cut"].reshape(16, 32)} for tree in trees]


def assert_equals_optax(tx, reference):
    gradients = with_vectors(folds.gradients(4, ("tall", "cut", "stack")))
    params = {name: PARAMS[name] for name in gradients[0]}
    updates = as_optax_folds(train(tx, gradients, params))
    (flat_params,) = as_optax_folds([params])
    assert_close(updates, train(reference, as_optax_folds(gradients), flat_params))


@pytest.mark.full
def test_adafactor_equals_that_of_optax():
    tx = fj.adafactor(0.1, rules=FACTORED)
    assert_equals_optax(tx, optax.adafactor(0.1, min_dim_size_to_factor=8))


@pytest.mark.full
def test_without_sketches_parameter_scale_and_rate_follow_the_momentum():
    """Unlike in ``optax.adafactor(momentum=…)``."""
    sketch = dataclasses.replace(SKETCH, mask=lambda path, shape: False)
    tx = fj.flora(0.1, sketch, 0.5, estimator="paper")
    reference = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=8),
        optax.clip_by_block_rms(1.0),
        optax.ema(0.5, debias=False),
        optax.scale_by_param_block_rms(),
        optax.scale_by_learning_rate(0.1),
    )
    with pytest.warns(UserWarning, match="0 of 4 leaves"):
        assert_equals_optax(tx, reference)


@pytest.mark.full
def test_adafactor_equals_the_chain_of_its_parts():
    gradients = with_vectors(folds.gradients(3, ("tall", "cut")))
    params = {name: PARAMS[name] for name in gradients[0]}
    mask = {name: name != "bias" for name in params}
    tx = fj.adafactor(
        0.1,
        decay_rate=0.7,
        epsilon=1e-20,
        clipping_threshold=0.8,
        weight_decay=0.2,
        weight_decay_mask=mask,
        rules=FACTORED,
    )
    chain = optax.chain(
        fj.scale_by_factored_rms(0.7, epsilon=1e-20, rules=FACTORED),
        optax.clip_by_block_rms(0.8),
        optax.scale_by_param_block_rms(),
        optax.add_decayed_weights(0.2, mask),
        optax.scale_by_learning_rate(0.1),
    )
    assert_close(train(tx, gradients, params), train(chain, gradients, params))
    plain = fj.adafactor(
        0.1, clipping_threshold=None, multiply_by_parameter_scale=False, rules=FACTORED
    )
    # Without a parameter scale and weight decay it does not ask for parameters.
    plain.update(gradients[0], plain.init(params))
    with pytest.raises(ValueError, match="adafactor\\(multiply_by_parameter_scale, w"):
        tx.update(gradients[0], tx.init(params))


@pytest.mark.full
def test_defaults_are_the_papers_but_for_estimator_and_projection():
    """And leaves below 128 stay dense."""
    params = {"w": jnp.ones((128, 512)), "small": jnp.ones((127, 512))}
    tx = fj.flora(0.1, 64)
    explicit = fj.flora(
        0.1,
        fj.Sketch(64, fj.CountSketch("unbiased"), side="smaller", min_dim_size=128),
        0.9,
        resample_every=1000,
        estimator="nesterov",
        decay_rate=0.8,
        epsilon=1e-30,
        clipping_threshold=1.0,
        multiply_by_parameter_scale=True,
        weight_decay=None,
    )
    rng = np.random.default_rng(0)
    gradients = [
        {k: rng.normal(size=x.shape).astype(np.float32) for k, x in params.items()}
        for _ in range(2)
    ]
    assert_close(train(tx, gradients, params), train(explicit, gradients, params))
    momentum = tx.init(params)[2].momentum
    assert momentum["w"].shape == (64, 512)
    assert momentum["small"].shape == (127, 512)


@pytest.mark.full
def test_bfloat16_gradients_of_float32_parameters():
    gradients = folds.gradients(4, ("tall",))
    half = [{"tall": jnp.asarray(g["tall"], jnp.bfloat16)} for g in gradients]
    params = {"tall": WEIGHTS["tall"]}
    tx = fj.flora(0.1, SKETCH, 0.5, resample_every=3, weight_decay=0.1)
    step, state = jax.jit(tx.update), tx.init(params)
    expected = train(tx, [jax.tree.map(np.float32, g) for g in half], params)
    for i, gradient in enumerate(half):
        updates, state = step(gradient, state, params)
        assert updates["tall"].dtype == jnp.bfloat16
        assert_close(updates, expected[i])
        params = optax.apply_updates(params, expected[i])


@pytest.mark.full
@pytest.mark.parametrize("estimator", ["paper", "nesterov", "fresh", "residual"])
def test_a_step_writes_no_second_copy_of_a_gradient(estimator):
    params = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
    tx = fj.flora(1e-3, 32, estimator=estimator)
    assert step_temporaries(tx, params) < 0.5 * 4 * 512 * 1024
