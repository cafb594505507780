"""Updates of equal singular values, against float64, Muon and the polynomial itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from experiments.common.collectives import collectives, total
from tests.common import assert_close
from tests.reference import folds
from tests.reference.muon import coefficients, orthogonalized, polynomial
from tests.sharding.test_meshes import sent_matrices

P = jax.P
# Roundings of 6e-8 of the norm, times the polynomials' slope of about 1000 at singular
# values near zero; relative to the largest entry.
TOLERANCE = 2e-4
# What five steps make of singular values from a thousandth of the norm to all of it.
SMALLEST = 0.001
LOW, HIGH = (
    f(polynomial(np.geomspace(SMALLEST, 1, 100_001))) for f in (np.min, np.max)
)


def make(steps=5, rms=0.2, dtype="float32", method=None, **rules):
    """The transformation, with small matrices among those that it treats."""
    return fj.orthogonalize(
        rms=rms,
        method=method or fj.NewtonSchulz(steps, dtype),
        rules=fj.LeafRules(**{"min_dim_size": 8, **rules}),
    )


def orthogonalize(updates, **settings):
    """The updates of one compiled step."""
    tx = make(**settings)
    state = tx.init(updates)
    assert state == optax.EmptyState()
    new, after = jax.jit(tx.update)(updates, state)
    assert after == state
    return new


def normal(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_near(actual, expected, tolerance=TOLERANCE):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def with_singular_values(n, m, values, seed=0):
    """A float32 matrix of n x m, and the orthogonal factors of it."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(n, len(values))))
    right, _ = np.linalg.qr(rng.normal(size=(m, len(values))))
    return jnp.float32((left * values) @ right.T), left, right


@pytest.mark.sample(4)
@pytest.mark.parametrize("settings", [{}, {"steps": 1}, {"steps": 3, "rms": 0.7}])
def test_equals_the_oracle(settings):
    (updates,) = folds.gradients(1)
    new = orthogonalize(updates, **settings)
    for name in folds.SHAPES:
        matrices = folds.fold(name, updates[name])
        expected = np.stack([orthogonalized(x, **settings) for x in matrices])
        assert new[name].shape == updates[name].shape
        assert_near(folds.fold(name, new[name]), expected)


def test_equals_the_oracle_with_dimension_numbers_and_batch_axes():
    # Rows are the last axis; both axes before the second are one batch.
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=3, output_axis=1)
    x = normal((2, 16, 3, 12))
    new = orthogonalize({"w": x}, weight_dimension_numbers=numbers)["w"]
    for i in range(2):
        for j in range(3):
            expected = orthogonalized(np.asarray(x)[i, :, j, :])
            assert_near(new[i, :, j, :], expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_updates_keep_their_dtype(dtype):
    with jax.enable_x64(dtype == "float64"):
        updates = {"w": normal((16, 24), dtype), "b": normal((16,), dtype)}
        new = orthogonalize(updates)
        assert {x.dtype.name for x in jax.tree.leaves(new)} == {dtype}
        # The arithmetic is float32's: only the result is rounded to less.
        expected = orthogonalized(updates["w"])
        if dtype in ("bfloat16", "float16"):
            assert_close(new["w"], expected, dtype)
        else:
            assert_near(new["w"], expected)
        np.testing.assert_array_equal(new["b"], updates["b"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("n", "m"), [(24, 40), (40, 24), (24, 24)])
def test_singular_values_are_the_polynomial_of_the_old(n, m, dtype):
    values = np.geomspace(1, 1e-5, 24)
    x, left, right = with_singular_values(n, m, values)
    shares = values / np.linalg.norm(values)
    new = fj.NewtonSchulz(dtype=dtype).polar_factor(x)
    assert new.dtype == jnp.float32
    inner = left.T @ np.asarray(new, np.float64) @ right
    found = np.linalg.svd(new, compute_uv=False)
    inside = shares >= (SMALLEST if dtype == "float32" else 0.01)
    assert 6 <= inside.sum() < 20
    assert np.diag(inner)[inside].min() >= 0.85
    assert found.max() <= 1.15
    if dtype == "bfloat16":
        # Smaller ones as the polynomial has them, but for what rounding X adds to them.
        diagonal = np.diag(inner)
        np.testing.assert_allclose(diagonal, polynomial(shares), rtol=0, atol=0.15)
        return
    # The vectors stay, the values are the scalar polynomial's, no others were added.
    atol = TOLERANCE * HIGH
    np.testing.assert_allclose(inner, np.diag(polynomial(shares)), rtol=0, atol=atol)
    np.testing.assert_allclose(
        found, np.sort(polynomial(shares))[::-1], rtol=0, atol=atol
    )


def test_the_range_of_the_polynomial():
    # What the documentation says of it, to its digits, and from which share of the norm
    # on it holds.
    assert 0.86 < LOW < 0.87
    assert 1.12 < HIGH < 1.13
    smaller = polynomial(np.geomspace(1e-7, SMALLEST, 100_001))
    assert (np.diff(smaller) > 0).all()
    assert smaller.max() < 0.87
    six = polynomial(np.geomspace(SMALLEST, 1, 100_001), steps=6)
    assert np.abs(six - 1).max() < 0.01


@pytest.mark.parametrize("rms", [0.2, 1.0])
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize(("n", "m"), [(16, 40), (40, 16)])
def test_the_root_mean_square_of_any_rank(n, m, rank, rms):
    x, *_ = with_singular_values(n, m, np.geomspace(1, 1e-4, rank))
    found = np.sqrt(np.mean(np.square(orthogonalize(x, rms=rms), dtype=np.float64)))
    np.testing.assert_allclose(found, rms, rtol=1e-5)


def test_what_is_next_to_nothing_makes_no_step_of_full_size():
    x = normal((16, 24))
    for size in (1e-15, 1e-20, 1e-30):
        found = np.sqrt(np.mean(np.square(orthogonalize(x * jnp.float32(size)))))
        largest = size * float(jnp.abs(x).max())
        np.testing.assert_allclose(found, 0.2 * largest / (largest + 1e-20), rtol=1e-3)


@pytest.mark.parametrize("size", [1e-14, 1e-7, 1e12, 1e25])
def test_the_size_of_updates_has_no_effect(size):
    x = normal((16, 24))
    ours, expected = orthogonalize([x * jnp.float32(size), x])
    assert_near(ours, expected)


def test_each_matrix_of_a_stack_has_a_size_of_its_own():
    sizes = jnp.float32([1e-14, 1.0, 1e20])[:, None, None]
    x = normal((16, 24))
    new = orthogonalize(sizes * x)
    for matrix in new:
        assert_near(matrix, orthogonalized(x))


def test_zeros_stay_zeros_beside_others():
    x = normal((3, 16, 24)).at[1].set(0)
    new = orthogonalize({"stack": x, "zeros": jnp.zeros((24, 16))})
    np.testing.assert_array_equal(new["zeros"], np.zeros((24, 16)))
    np.testing.assert_array_equal(new["stack"][1], np.zeros((16, 24)))
    for i in (0, 2):
        assert_near(new["stack"][i], orthogonalized(x[i]))


def test_nan_is_not_hidden():
    x = normal((16, 24)).at[3, 4].set(jnp.nan)
    assert np.isnan(orthogonalize(x)).all()


@pytest.mark.sample(1)
@pytest.mark.parametrize("form", ["callable", "tree"])
def test_leaves_that_pass(form):
    shapes = {
        "matrix": (16, 24),
        "vector": (16,),
        "scalar": (),
        "narrow": (16, 4),
        "long": (8, 200),
        "embedding": (16, 32),
    }
    updates = {name: normal(shape) for name, shape in shapes.items()}
    mask = {name: name != "embedding" for name in shapes}
    if form == "callable":
        masks, mask = mask, lambda path, shape: masks[path]
    new = orthogonalize(updates, mask=mask)
    for name in shapes:
        if name != "matrix":
            np.testing.assert_array_equal(new[name], updates[name], err_msg=name)
    assert_near(new["matrix"], orthogonalized(updates["matrix"]))
    # By the rules' own numbers the others would not pass.
    new = orthogonalize(updates, min_dim_size=4, max_aspect_ratio=25)
    for name in ("narrow", "long", "embedding"):
        assert_near(new[name], orthogonalized(updates[name]))


def test_small_matrices_pass_by_default():
    updates = {"w": normal((128, 128)), "small": normal((127, 128))}
    tx = fj.orthogonalize()
    new, _ = jax.jit(tx.update)(updates, tx.init(updates))
    np.testing.assert_array_equal(new["small"], updates["small"])
    assert_near(new["w"], orthogonalized(updates["w"]))


def test_a_tree_without_leaves():
    assert orthogonalize({}) == {}


@pytest.mark.sample(1)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_equals_muon_without_momentum(shape):
    updates = {"w": normal(shape)}
    muon = optax.contrib.muon(
        1.0,
        ns_coeffs=tuple(coefficients(5)),
        beta=0.0,
        nesterov=False,
        consistent_rms=0.2,
    )
    expected, _ = jax.jit(muon.update)(updates, muon.init(updates), updates)
    # Which has the root mean square of an exact polar factor.
    size = np.sqrt(np.mean(np.square(expected["w"]))) / 0.2
    assert_near(-orthogonalize(updates)["w"], expected["w"] / size)


def test_inject_hyperparams_traces_rms_alone():
    x = normal((16, 24))
    rules = fj.LeafRules(min_dim_size=8)
    tx = optax.inject_hyperparams(fj.orthogonalize)(rms=0.3, rules=rules)
    state = tx.init(x)
    assert set(state.hyperparams) == {"rms"}
    assert_near(jax.jit(tx.update)(x, state)[0], orthogonalized(x, rms=0.3))


def test_extra_arguments_and_missing_leaves():
    x = normal((16, 24))
    tx = make()
    new, _ = jax.jit(tx.update)({"w": x, "none": None}, tx.init(x), x, another=1)
    assert new["none"] is None
    assert_near(new["w"], orthogonalized(x))


def test_rms_may_be_traced():
    x = normal((16, 24))

    @jax.jit
    def step(rms):
        tx = make(rms=rms)
        return tx.update(x, tx.init(x))[0]

    assert_near(step(jnp.float32(0.3)), orthogonalized(x, rms=0.3))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"steps": 0}, ValueError, "`steps` must be positive, got steps=0; 5 is Muon"),
        ({"steps": 2.5}, TypeError, r"`steps` must be an int, got steps=2\.5"),
        ({"steps": True}, TypeError, "`steps` must be an int, got steps=True"),
        ({"steps": jnp.int32(5)}, TypeError, "`steps`"),
        ({"dtype": "float16"}, ValueError, "`dtype` must be .*got .*'float16'"),
        ({"rms": -0.2}, ValueError, "`rms` must be at least 0, got rms=-0.2; 0.2 is"),
        ({"rms": float("nan")}, ValueError, "`rms` must be at least 0, got rms=nan"),
        ({"rms": "0.2"}, TypeError, "`rms` must be a real number, got '0.2'"),
        ({"rms": None}, TypeError, "`rms` must be a real number, got None"),
        ({"rms": jnp.ones(2)}, TypeError, r"`rms` must be a real number.*\(2,\)"),
        ({"mask": "wte"}, TypeError, "`mask` must be a callable .* got mask='wte'"),
        ({"mask": True}, TypeError, "`mask` must be a callable .* got mask=True"),
        ({"min_dim_size": 0}, ValueError, "`min_dim_size` must be positive, got"),
        ({"max_aspect_ratio": 0.5}, ValueError, "`max_aspect_ratio` must be at least"),
    ],
)
def test_refuses(arguments, error, match):
    with pytest.raises(error, match=match):
        make(**arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"method": "svd"}, r"`method` must be NewtonSchulz\(\) or .*, got 'svd'"),
        ({"rules": {"min_dim_size": 8}}, r"`rules` must be LeafRules\(\), got {"),
    ],
)
def test_refuses_other_objects(arguments, match):
    with pytest.raises(TypeError, match=match):
        fj.orthogonalize(**arguments)


def test_refuses_integers():
    tx = make()
    with pytest.raises(TypeError, match="'w' must have a real floating dtype"):
        tx.update({"w": jnp.ones((16, 24), jnp.int32)}, optax.EmptyState())


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_outputs_of_equal_norm(size):
    x = size * normal((3, 16, 24)).at[:, :, 5].set(0)
    tx = make(rms=0.3, method=fj.RowNormalization())
    new, _ = tx.update({"w": x}, tx.init({"w": x}))
    exact = np.asarray(x, np.float64)
    norms = np.linalg.norm(exact, axis=-2, keepdims=True)
    expected = exact / np.where(norms > 0, norms, 1)
    expected *= 0.3 * np.sqrt(
        16 * 24 / np.square(expected).sum((-2, -1), keepdims=True)
    )
    if size < 1e-20:  # Updates of nothing are no steps of full size.
        assert np.abs(new["w"]).max() < 1e-3 * np.abs(expected).max()
        return
    np.testing.assert_allclose(new["w"], expected, rtol=1e-5, atol=1e-7)


def test_flora_muon_takes_a_method():
    params = {"w": normal((32, 48))}
    sketch = fj.Sketch(8, min_dim_size=16)
    tx = fj.flora_muon(1.0, sketch, rms=0.3, method=fj.RowNormalization())
    updates, _ = tx.update(params, tx.init(params), params)
    norms = np.linalg.norm(updates["w"], axis=0)
    np.testing.assert_allclose(norms, 0.3 * np.sqrt(32), rtol=1e-5)


def test_a_moment_in_a_subspace():
    # SUMO's place: of the update, r singular values are equal and the others zero.
    muon = optax.chain(optax.trace(0.95), make(min_dim_size=1))
    tx = fj.scale_in_subspace(muon, fj.Sketch(4, fj.TopSVD(), min_dim_size=8))
    x = normal((16, 24))
    updates, state = tx.update({"w": x}, tx.init({"w": x}))
    assert state.inner[0].trace["w"].shape == (4, 24)
    left, _, _ = np.linalg.svd(np.asarray(x, np.float64))
    expected = left[:, :4] @ orthogonalized(left[:, :4].T @ np.asarray(x))
    assert_near(np.abs(updates["w"]), np.abs(expected), 1e-2)
    values = np.linalg.svd(updates["w"], compute_uv=False)
    assert values[3] >= 0.7 * values[0]
    assert values[4] <= 1e-5 * values[0]


# What a device sends of a matrix of 16 x 32, at most: where only the longer side is
# sharded, the sums of the 16 x 16 elements of X Xᵀ; else the full matrix.
SIZES = {"data": 4, "model": 2}
LAYOUTS = {
    "longer": (P(None, ("data", "model")), 16 * 16),
    "shorter": (P("data", None), 16 * 32),
    "both": (P("data", "model"), 16 * 32),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh(layout, kind):
    spec, most = LAYOUTS[layout]
    tall = P(*reversed(tuple(spec)))
    specs, shapes = {"wide": spec, "tall": tall}, {"wide": (16, 32), "tall": (32, 16)}
    step = on_mesh(kind, specs, shapes)
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all")
    assert max(sent_matrices(step, *kinds)) <= most


@pytest.mark.sample(1)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_each_matrix_of_a_stack_is_on_one_device(layout, kind):
    spec, _ = LAYOUTS[layout]
    shapes = {"stack": (11, 16, 32), "experts": (2, 3, 16, 32)}
    specs = {"stack": P(None, *spec), "experts": P(None, None, *spec)}
    found = collectives(on_mesh(kind, specs, shapes).as_text())
    # As 16 matrices and 8: what a device has of them is sent along two axes of a mesh,
    # and back. Of each matrix a few scalars are summed up, which decide its size.
    shards = math.prod(SIZES[x] for x in SIZES if x in str(spec))
    moved = [x for x in found if x.kind != "all-reduce"]
    assert total(moved) <= 4 * 4 * (16 + 8) * 16 * 32 // shards
    assert all(math.prod(s) <= 11 for x in found if x not in moved for s in x.shapes)


def test_normalization_sends_norms():
    shapes = {"wide": (16, 32), "stack": (3, 16, 32)}
    specs = {"wide": P("data", "model"), "stack": P(None, "data", "model")}
    step = on_mesh("Auto", specs, shapes, method=fj.RowNormalization())
    found = collectives(step.as_text())
    # A maximum and a norm of each of a device's 16 columns.
    assert 0 < max(math.prod(s) for x in found for s in x.shapes) <= 3 * 16


def on_mesh(kind, specs, shapes, **settings):
    """The compiled step, after a comparison with what one device gives."""
    axis_types = (jax.sharding.AxisType[kind],) * 2
    mesh = jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), axis_types=axis_types)
    updates = {name: normal(shape) for name, shape in shapes.items()}
    where = {name: jax.NamedSharding(mesh, s) for name, s in specs.items()}
    tx = make(**settings)
    with jax.set_mesh(mesh):
        placed = jax.device_put(updates, where)
        step = jax.jit(lambda u: tx.update(u, tx.init(u))[0], out_shardings=where)
        step = step.lower(placed).compile()
        found = step(placed)
    expected = orthogonalize(updates, **settings)
    for name, update in found.items():
        assert update.sharding.is_equivalent_to(where[name], update.ndim)
        assert_near(update, expected[name])
    return step
