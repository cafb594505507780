"""Every error of the transformations inside a subspace, by its message."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

import flora_jax as fj

GAUSSIAN = fj.Gaussian()
RECIPES = [
    fj.galore,
    fj.fira,
    fj.apollo,
    fj.apollo_mini,
    fj.dct_adamw,
    fj.flora_adamw,
    fj.flora_muon,
]
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda f: f.__name__)


def make(inner=None, projection=None, rank=4, side="smaller", **settings):
    inner = optax.scale_by_adam() if inner is None else inner
    sketch = fj.Sketch(rank, projection, side=side, min_dim_size=8)
    return fj.scale_in_subspace(inner, sketch, **settings)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"projection": "svd"}, TypeError, "must be a flora_jax projection, got 'svd'"),
        ({"projection": fj.TopSVD}, TypeError, "pass an instance such as"),
        ({"refresh_every": 0}, ValueError, "`refresh_every` must be positive, got"),
        ({"refresh_every": 2.5}, TypeError, "`refresh_every` must be an int"),
        ({"inner": optax.scale_by_adam}, TypeError, "`inner` must be .* the factory"),
        ({"inner": 3}, TypeError, "`inner` must be an optax transformation, got 3"),
        ({"transport": "squared"}, TypeError, "`transport` must be .*, got 'squared'"),
        ({"transport": fj.Squared}, TypeError, "`transport` must be .* an instance"),
        ({"residual": "fira"}, TypeError, "`residual` must be None, .*, got 'fira'"),
        ({"residual": fj.Fira}, TypeError, "`residual` must be None, .* an instance"),
        (
            {"residual": fj.Fira(norms="row")},
            ValueError,
            "`norms` must be one of 'channel', 'tensor'",
        ),
        ({"scale": -0.25}, ValueError, "`scale` must be at least 0, got scale=-0.25"),
        ({"scale": "1"}, TypeError, "`scale` must be a real number, got '1'"),
        (
            {"residual": fj.Fira(b1=1.0, b2=0.9)},
            ValueError,
            r"`b1` must lie in \[0, 1\), got b1=1.0",
        ),
        (
            {"transport": fj.Reset(b1=0.9, b2=-0.1)},
            ValueError,
            r"`b2` must lie in \[0, 1\), got b2=-0.1",
        ),
        (
            {"transport": fj.LDAdam(b1="0.9", b2=0.9)},
            TypeError,
            "`b1` must be a real number, got '0.9'",
        ),
        (
            {"residual": fj.Apollo(b1=0.9)},
            ValueError,
            r"`b1` and `b2` must be given together, got Apollo\(.*b2=None\)",
        ),
        (
            {"residual": fj.Fira(limiter=0.0)},
            ValueError,
            "`limiter` must be at least .*, got limiter=0.0; 1.01, or None",
        ),
        (
            {"residual": fj.Fira(limiter="1.01")},
            TypeError,
            "`limiter` must be a real number, got '1.01'",
        ),
        (
            {"error_feedback": True, "residual": fj.Plain()},
            ValueError,
            r"`error_feedback` keeps .* got residual=Plain\(\), which leaves out",
        ),
        (
            {"error_feedback": True, "projection": GAUSSIAN},
            ValueError,
            "`error_feedback` needs .* orthonormal rows, got Gaussian",
        ),
        (
            {"residual": fj.Plain(), "projection": fj.CountSketch("unbiased")},
            ValueError,
            r"`residual` Plain\(\) needs .* orthonormal rows, got .*unbiased",
        ),
        (
            {"residual": fj.Fira(), "projection": GAUSSIAN},
            ValueError,
            r"`residual` Fira\(.*\) needs .* orthonormal rows, got Gaussian",
        ),
        (
            {"transport": fj.PreserveRMS(), "projection": GAUSSIAN},
            ValueError,
            r"`transport` PreserveRMS\(\) needs .* orthonormal rows, got Gaussian",
        ),
        (
            {"transport": fj.PreserveRMS(), "projection": fj.TopDCT()},
            ValueError,
            r"`transport` PreserveRMS\(\) is for bases that a key .*, got TopDCT",
        ),
        ({"stagger": 1}, TypeError, "`stagger` must be True or False, got stagger=1"),
        ({"error_feedback": "no"}, TypeError, "`error_feedback` must be True or False"),
        (
            {"transport": fj.LDAdam()},
            ValueError,
            "`transport` LDAdam needs the decays of `inner`, got b1=None, b2=None",
        ),
    ],
)
def test_settings(arguments, error, match):
    with pytest.raises(error, match=match):
        make(**arguments)


def test_settings_that_need_no_orthonormal_rows():
    make(projection=GAUSSIAN)
    make(projection=GAUSSIAN, residual=fj.Apollo())
    make(projection=GAUSSIAN, transport=fj.Reset())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"b1": 1.0}, ValueError, r"`b1` must lie in \[0, 1\), got b1=1.0"),
        ({"b2": -0.1}, ValueError, r"`b2` must lie in \[0, 1\), got b2=-0.1"),
        ({"eps": -1e-8}, ValueError, "`eps` must be at least 0, got eps=-1e-08"),
        ({"eps": "0"}, TypeError, "`eps` must be a real number, got '0'"),
        ({"weight_decay": -0.1}, ValueError, "`weight_decay` must be at least 0"),
        ({"refresh_every": 0}, ValueError, "`refresh_every` must be positive"),
        ({"state_dtype": "int4"}, ValueError, "`state_dtype` must be one of 'int8', "),
        ({"sketch": 0}, ValueError, "`rank` must be positive, got rank=0"),
        ({"sketch": jnp.int32(4)}, TypeError, r"got the array 4, .*fj\.Sketch\(8\)"),
        ({"learning_rate": "1"}, TypeError, "`learning_rate` must be a real number"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
@each_recipe
def test_recipes(recipe, arguments, error, match):
    with pytest.raises(error, match=match):
        recipe(**{"learning_rate": 1e-3, "sketch": 4, **arguments})


@pytest.mark.parametrize(
    ("recipe", "arguments", "error", "match"),
    [
        (fj.galore, {"scale": -1.0}, ValueError, "`scale` must be at least 0, got"),
        (fj.apollo, {"scale": -1.0}, ValueError, "`scale` must .* the paper uses 1$"),
        (fj.apollo_mini, {"scale": -1.0}, ValueError, "the paper uses 128"),
        (
            fj.flora_adamw,
            {"orthogonal": 1},
            TypeError,
            "`orthogonal` must be True or False, got orthogonal=1",
        ),
        (
            fj.flora_muon,
            {"momentum": 1.0},
            ValueError,
            r"`momentum` must lie in \[0, 1\), got momentum=1.0",
        ),
        (fj.flora_muon, {"rms": -1.0}, ValueError, "`rms` must be at least 0, got"),
    ],
)
def test_arguments_of_some_recipes(recipe, arguments, error, match):
    with pytest.raises(error, match=match):
        recipe(1e-3, 4, **arguments)


@each_recipe
def test_weight_decay_needs_parameters(recipe):
    sketch = fj.Sketch(4, min_dim_size=8)
    tx, g = recipe(1e-3, sketch, weight_decay=0.1), {"w": jnp.ones((16, 24))}
    match = rf"given for {recipe.__name__}\(weight_decay\), got"
    with pytest.raises(ValueError, match=match):
        tx.update(g, tx.init(g))


def test_more_directions_than_a_matrix_has():
    # Of 8 x 24 the larger side has no more than 8 singular vectors.
    tx = make(projection=fj.TopSVD(method="exact"), rank=9, side="larger")
    with pytest.raises(
        ValueError, match="`rank` of leaf 'w' must be at most 8, .* 8x24 fold .* rank=9"
    ):
        tx.init({"w": jnp.zeros((8, 24))})
    cosines = make(projection=fj.TopDCT(), rank=9, side="larger")
    assert cosines.init({"w": jnp.zeros((8, 24))}).basis["w"].shape == (1, 9)


def test_widths_of_cosines_are_checked_by_update():
    sketch = fj.Sketch(4, fj.TopDCT(), side="larger", max_aspect_ratio=1e5)
    sketch = dataclasses.replace(sketch, min_dim_size=8)
    tx = fj.scale_in_subspace(optax.scale_by_adam(), sketch)
    params = {"w": jax.ShapeDtypeStruct((8, 46341), jnp.float32)}
    state = jax.eval_shape(tx.init, params)
    with pytest.raises(
        ValueError, match="takes sides up to 46340, got a side of 46341"
    ):
        jax.eval_shape(tx.update, params, state)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda g: {**g, "new": jnp.ones(3)},
            r"`state\.inner\.mu` of scale_in_subspace",
        ),
        (lambda g: {"w": g["w"]}, "has leaf 'b' of shape .* `updates` has none"),
        (lambda g: {**g, "w": jnp.ones((16, 32))}, "leaf 'w' of `updates` has shape"),
        (lambda g: {**g, "w": jnp.ones((24, 16))}, "leaf 'w' of `updates` has shape"),
    ],
)
def test_gradients_that_do_not_match_the_state(change, match):
    g = {"w": jnp.ones((16, 24)), "b": jnp.ones(24)}
    tx = make()
    with pytest.raises(ValueError, match=match):
        tx.update(change(g), tx.init(g))


def test_gradients_that_do_not_match_the_limiter():
    # An inner transformation without moments tells nothing of the parameters.
    tx = make(inner=optax.identity(), residual=fj.Apollo())
    g = {"w": jnp.ones((16, 24)), "b": jnp.ones(24)}
    with pytest.raises(ValueError, match=r"`state\.limiter` of scale_in_subspace"):
        tx.update({"w": g["w"]}, tx.init(g))


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("projection", "shape"),
    [(fj.Gaussian(), (16, 24)), (fj.Gaussian(), (24, 16)), (fj.TopDCT(), (24, 16))],
)
def test_a_tree_of_one_array(projection, shape):
    # Its state is one array, too, here with an axis of 1.
    tx = make(
        projection=projection,
        rank=1,
        residual=fj.Apollo(),
        transport=fj.Reset(),
    )
    g = jnp.ones(shape)
    updates, state = jax.jit(tx.update)(g, tx.init(g))
    assert updates.shape == g.shape
    assert state.limiter.shape == (1, 1)


def test_moments_that_no_transport_moves():
    # AMSGrad keeps the largest second moments beside the others.
    tx = make(inner=optax.scale_by_amsgrad(), transport=fj.Squared())
    with pytest.raises(ValueError, match="ScaleByAmsgradState, which keeps other"):
        tx.init({"w": jnp.ones((16, 24))})
    make(inner=optax.scale_by_amsgrad()).init({"w": jnp.ones((16, 24))})


@pytest.mark.parametrize("field", ["basis", "error"])
def test_a_state_of_other_shapes(field):
    tx = make(projection=fj.TopSVD(method="exact"), error_feedback=True)
    g = {"w": jnp.ones((16, 24))}
    state = tx.init(g)
    wrong = state._replace(**{field: {"w": jnp.ones((16, 3))}})
    with pytest.raises(ValueError, match=rf"`state\.{field}` of scale_in_subspace"):
        tx.update(g, wrong)
