"""A gradient sketched during backpropagation equals the sketch of the full one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import flora_jax as fj
from flora_jax.sketched_grad.planner import Planner
from flora_jax.sketched_grad.rules import axes_before_reshape
from flora_jax.sketching.sketch import resolve
from flora_jax.sketching.sketcher import ScaledLeaf, Sketcher
from flora_jax.transforms.accumulation import NAME
from tests.transforms.samples import case_id

RANK, CYCLE = 4, 2


def sketch_of(rank=RANK, **settings):
    return fj.Sketch(rank, key=3, **{"min_dim_size": 8} | settings)


def numbers(seed, *shape, scale=0.3):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


X = jnp.asarray(numbers(0, 4, 6, 16, scale=1))


def full_sketches(grads, sketch):
    """The sketches of full gradients, as compressed_accumulation makes them."""
    sketcher = Sketcher(NAME, resolve(sketch, fj.CountSketch("unbiased")))
    plans = sketcher.plan(grads)
    sampled = sketcher.sample(plans, jnp.asarray(sketcher.sketch.key_data), CYCLE)
    leaves = [ScaledLeaf(x) for x in jax.tree.leaves(grads)]
    found = map(sketcher.sketch_leaf, plans, sampled, leaves)
    return jax.tree.unflatten(jax.tree.structure(grads), list(found))


def compare(fun, params, sketch=None, tolerance=1e-6, compile_with=jax.jit):
    """Asserts equality for every leaf; returns the reports by path."""
    sketch = sketch or sketch_of()

    @compile_with
    def both(params):
        gradient = fj.sketched_value_and_grad(fun, sketch)
        value, grads = jax.value_and_grad(fun)(params)
        ours = gradient(sketch.cycle(CYCLE), params)
        return ours, (value, full_sketches(grads, sketch))

    (value, ours), (expected, theirs) = both(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    reports = fj.explain_sketched_gradients(fun, sketch)(params)
    leaves = jax.tree.leaves(ours.tree), jax.tree.leaves(theirs)
    for report, x, y in zip(reports, *leaves, strict=True):
        assert x.shape == y.shape
        if report.dense_reason is None:
            assert x.dtype == jnp.float32
        error = np.linalg.norm(np.asarray(x, np.float64) - y)
        assert error <= tolerance * np.linalg.norm(y), (report.path, error)
        assert np.linalg.norm(y) > 0, report.path
    return {report.path: report for report in reports}


def _scanned(w):
    @jax.checkpoint
    def body(h, w):
        return jnp.tanh(h @ w), None

    return jax.lax.scan(body, X, w)[0]


def _scanned_without_remat(w):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), jnp.sum(h @ w)), X, w)[0]


def _shared_in_scan(w):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), X, None, length=3)[0]


def _nested_scan(w):
    def outer(h, w):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, w)[0], None

    return jax.lax.scan(outer, X, w)[0]


def _branches(w):
    def double(w):
        return 2 * jnp.tanh(X @ w)

    return jax.lax.cond(X[0, 0, 0] > 0, double, lambda w: X @ w.T.T, w)


@jax.custom_vjp
def _custom(w):
    return X @ w


_custom.defvjp(
    lambda w: (X @ w, None),
    lambda _, d: (jnp.einsum("bti,bto->io", X, d) * 0.5,),
)


def _one_layer_each(w):
    h = X
    for i in range(3):
        h = jnp.tanh(h @ w[i])
    return h


def _traced_layer(w):
    return jax.lax.fori_loop(
        0, 3, lambda i, h: jnp.tanh(h @ jax.lax.dynamic_index_in_dim(w, i, 0, False)), X
    )


def _per_example(w):
    return jax.vmap(lambda x, w: jnp.tanh(x @ w), (0, None))(X, w)


def _copies(w):
    every = jnp.broadcast_to(w, (4, *w.shape))  # One weight per example, then the sum.
    return jax.vmap(jnp.matmul)(X, every)


# What is made of the weight, by its name; its shape.
FUNCTIONS = {
    "columns": (lambda w: X @ w, (16, 12)),
    "rows": (lambda w: X @ w, (16, 24)),
    "transposed": (lambda w: X @ w.T, (24, 16)),
    "twice": (lambda w: jnp.tanh(X @ w) @ w, (16, 16)),
    "tied": (lambda w: jnp.tanh(X @ w) @ w.T, (16, 24)),
    "heads": (lambda w: jnp.einsum("bti,ihd->bhtd", X, w), (16, 3, 8)),
    "out of heads": (
        lambda w: jnp.einsum("bthd,hdo->bto", X.reshape(4, 6, 2, 8), w),
        (2, 8, 24),
    ),
    "fused": (lambda w: jnp.stack(jnp.split(X @ w, 3, -1)), (16, 36)),
    "bfloat16": (
        lambda w: jnp.matmul(X.astype("bfloat16"), w.astype("bfloat16")),
        (16, 24),
    ),
    "scaled": (lambda w: X @ (w * jnp.arange(24.0)) / 3, (16, 24)),
    "minus": (lambda w: X @ (1 - w) - X @ w, (16, 24)),
    "reshaped": (lambda w: X @ w.reshape(16, 24), (16, 2, 3, 4)),
    "expanded": (lambda w: X @ w[:, None].squeeze(1), (16, 24)),
    "joined": (lambda w: X @ jnp.concatenate([w, 2 * w], axis=1), (16, 24)),
    "cut": (lambda w: X[..., :10] @ w[:10], (16, 12)),
    "padded": (lambda w: jnp.pad(X, ((0, 0),) * 2 + ((0, 4),)) @ w[:20], (20, 12)),
    "jit": (jax.jit(lambda w: jnp.tanh(X @ w) @ jax.jit(jnp.transpose)(w)), (16, 24)),
    "vmap": (_per_example, (16, 24)),
    "summed copies": (_copies, (16, 24)),
    "remat": (jax.checkpoint(lambda w: jnp.tanh(X @ w) @ w), (16, 16)),
    "scan": (_scanned, (3, 16, 16)),
    "scan without remat": (_scanned_without_remat, (3, 16, 16)),
    "scan, shared": (_shared_in_scan, (16, 16)),
    "scan in scan": (_nested_scan, (2, 3, 16, 16)),
    "cond": (_branches, (16, 24)),
    "custom_vjp": (_custom, (16, 24)),
    "layers of a stack": (_one_layer_each, (3, 16, 16)),
    "layers by traced index": (_traced_layer, (3, 16, 16)),
    "experts": (lambda w: jnp.einsum("ebi,eio->ebo", X, w), (4, 16, 24)),
    "stacked heads": (lambda w: jnp.einsum("bti,hid->bhtd", X, w), (4, 16, 8)),
    "of both operands": (
        lambda w: jnp.einsum("bti,bts,is->b", X, X[..., :8], w.reshape(16, 8)),
        (16, 2, 4),
    ),
    "embedding": (lambda w: jnp.take(w, jnp.arange(20) % 7, axis=0), (24, 16)),
    "embedding and head": (
        lambda w: jnp.take(w, jnp.arange(20) % 7, axis=0) @ w.T,
        (24, 16),
    ),
}


# The quick tier has these.
COMMON = ("columns", "heads", "scan", "cond")


def in_quick_tier(names, quick):
    """Parameters; the cases of a tier are one program, compiled by one process."""
    return [
        pytest.param(
            name,
            marks=[
                pytest.mark.xdist_group(f"sketched_grad {name in quick}"),
                *([] if name in quick else [pytest.mark.full]),
            ],
        )
        for name in names
    ]


@functools.cache
def functions(names):
    """Some functions in one program: reports by name."""
    params = {name: numbers(i, *FUNCTIONS[name][1]) for i, name in enumerate(names)}

    def loss(params):
        outputs = {name: FUNCTIONS[name][0](params[name]) for name in names}
        return sum(
            jnp.sum(jnp.sin(x.astype(jnp.float32) + 0.1)) for x in outputs.values()
        )

    if "bfloat16" not in names:
        return compare(loss, params)
    # The full gradient is rounded to bfloat16 before it is sketched, ours after.
    others = sketch_of(mask=lambda path, shape: path != "bfloat16")
    exact = compare(loss, params, others)
    rounded = {"bfloat16": params.pop("bfloat16")}
    return exact | compare(lambda p: loss({**params, **p}), rounded, tolerance=2**-7)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", in_quick_tier(FUNCTIONS, COMMON))
def test_a_weight_is_sketched_during_backpropagation(name):
    tier = tuple(x for x in FUNCTIONS if (x in COMMON) == (name in COMMON))
    report = functions(tier)[name]
    assert report.dense_reason is None
    assert report.fallbacks == ()
    assert report.sketched_during_backpropagation


def _loop(w):
    return jax.lax.associative_scan(jnp.multiply, jnp.tanh(w))


# What is made of a weight, its shape, and where and at which shape its gradient stops.
FALLBACKS = {
    "square": (lambda w: X @ w**2, (16, 24), "mul", (16, 24)),
    "masked": (lambda w: X @ jnp.where(w > 0, w, 0), (16, 24), "select_n", (16, 24)),
    "alone": (lambda w: 3 * w, (16, 24), "cos", (16, 24)),
    "summed": (lambda w: X @ w + jnp.sum(w), (16, 12), "broadcast_in_dim", (16, 12)),
    "cut on its sketched side": (lambda w: X @ w[:, :9], (16, 12), "pad", (16, 12)),
    "cumsum": (lambda w: X @ jnp.cumsum(w, 1), (16, 12), "cumsum", (16, 12)),
    "convolution": (
        lambda w: jax.lax.conv_general_dilated(
            X.reshape(4, 16, 6),
            w,
            (1,),
            "SAME",
            dimension_numbers=("NCW", "WIO", "NCW"),
        ),
        (3, 16, 24),
        "conv_general_dilated",
        (3, 16, 24),
    ),
    "in a loop": (
        lambda w: jax.lax.scan(
            lambda h, w: (jnp.tanh(h @ w**2), None), X, w.reshape(2, 16, 16)
        )[0],
        (2, 16, 16),
        "mul",
        (16, 16),
    ),
}


COMMON_FALLBACKS = ("square",)


@functools.cache
def fallbacks(names):
    """Reports by name."""
    params = {name: numbers(i, *FALLBACKS[name][1]) for i, name in enumerate(names)}

    def loss(params):
        outputs = (FALLBACKS[name][0](params[name]) for name in names)
        return sum(jnp.sum(jnp.sin(x + 0.1)) for x in outputs)

    return compare(loss, params)


@pytest.mark.parametrize("name", in_quick_tier(FALLBACKS, COMMON_FALLBACKS))
def test_what_no_rule_knows_is_computed_in_full_and_listed(name):
    common = name in COMMON_FALLBACKS
    tier = tuple(x for x in FALLBACKS if (x in COMMON_FALLBACKS) == common)
    report, (_, _, primitive, shape) = fallbacks(tier)[name], FALLBACKS[name]
    assert (primitive, shape) in [x[1:3] for x in report.fallbacks]
    assert not report.sketched_during_backpropagation


@pytest.mark.sample(1)
@pytest.mark.parametrize("index", [-1, 5, -5, -4, 1])
def test_a_layer_by_any_index(index):
    """Those that are out of range are clamped, once."""
    stack = {"w": numbers(1, 3, 16, 16)}

    def loss(p):
        at = jnp.int32(index) + jnp.zeros_like(X[0, 0, 0], jnp.int32)
        return jnp.sum(jnp.sin(X @ jax.lax.dynamic_index_in_dim(p["w"], at, 0, False)))

    assert compare(loss, stack)["w"].sketched_during_backpropagation


@pytest.mark.full
def test_a_loop_without_iterations():
    def loss(w):
        return jnp.sum(jax.lax.scan(lambda h, w: (h @ w, None), X, w)[0])

    w, sketch = jnp.zeros((0, 16, 16)), sketch_of()
    value, grads = fj.sketched_value_and_grad(loss, sketch)(sketch.cycle(CYCLE), w)
    np.testing.assert_allclose(value, jnp.sum(X), rtol=1e-6)
    assert grads.tree.size == 0


def test_casts_that_change_a_factor_and_narrow_operands():
    params = {name: numbers(i, 16, 24) for i, name in enumerate("abc")}
    columns = jnp.broadcast_to(0.4 * jnp.arange(24.0), (16, 24))
    narrow = (40 * X).astype("int8")

    def loss(p):
        small = jax.lax.dot_general(
            narrow, p["c"], (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        products = (
            X @ (p["a"] * columns.astype(bool)),
            X @ (p["b"] * columns.astype(int)),
        )
        return sum(jnp.sum(jnp.sin(y + 0.1)) for y in (*products, small))

    reports = compare(loss, params)
    assert not any(
        report.sketched_during_backpropagation for report in reports.values()
    )
    assert "too narrow" in reports["c"].fallbacks[0].reason


PROJECTIONS = [
    fj.CountSketch(),
    fj.CountSketch("isometric"),
    fj.Gaussian(),
    fj.Rademacher(),
    fj.Orthogonal(),
    fj.SRHT(),
]


@pytest.mark.full
@pytest.mark.parametrize("projection", PROJECTIONS, ids=case_id)
def test_every_projection_that_a_key_regenerates(projection):
    params = {
        "columns": numbers(1, 16, 12),
        "rows": numbers(2, 16, 24),
        "loop": numbers(3, 2, 16, 16),
        "full": numbers(4, 16, 20),
    }

    def loss(p):
        h = jnp.tanh(X @ p["columns"]) @ p["columns"].T + X
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["loop"])[0]
        return jnp.sum(jnp.sin(h @ p["rows"])) + jnp.sum(jnp.sin(h @ p["full"] ** 2))

    reports = compare(loss, params, sketch_of(5, projection=projection))
    assert [path for path, r in reports.items() if r.fallbacks] == ["full"]


def test_a_projection_that_is_chosen_from_the_gradient_is_refused():
    sketch = fj.Sketch(4, projection=fj.TopSVD())
    for function in (fj.sketched_value_and_grad, fj.explain_sketched_gradients):
        with pytest.raises(TypeError, match="one that a key regenerates"):
            function(jnp.sum, sketch)


def _heads(p):
    return jnp.sum(jnp.sin(jnp.einsum("bti,ihd->bthd", X, p["w"])))


@pytest.mark.sample(1)
@pytest.mark.parametrize("side", ["left", "right"])
def test_both_sides(side):
    report = compare(_heads, {"w": numbers(1, 16, 3, 8)}, sketch_of(side=side))["w"]
    assert report.sketched_during_backpropagation


@pytest.mark.full
@pytest.mark.parametrize(
    ("rows", "columns"), [((0,), (2,)), ((0,), (2, 1)), ((2, 0), (1,))]
)
def test_named_axes(rows, columns):
    """The heads are batch, and share one S; the columns in the order of their names."""
    sketch = sketch_of(
        2,
        weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(rows, columns),
        min_dim_size=3,
        max_aspect_ratio=100,
    )
    report = compare(_heads, {"w": numbers(1, 16, 3, 8)}, sketch)["w"]
    assert report.sketched_during_backpropagation


def test_arguments_and_results_are_those_of_value_and_grad():
    w, v, x = numbers(1, 16, 24), numbers(2, 24, 16), X

    def fun(w, x, v, *, scale):
        h = jnp.tanh(x @ w) @ v
        assert isinstance(scale, float)  # What is not differentiated is not traced.
        return jnp.sum(h) * scale, {"mean": h.mean(), "h": [h]}

    settings = {"argnums": (2, 0), "has_aux": True}
    sketch = sketch_of()
    gradient = fj.sketched_value_and_grad(fun, sketch, **settings)
    ours = functools.partial(gradient, sketch.cycle(CYCLE), scale=0.5)
    theirs = jax.value_and_grad(fun, **settings)
    (value, aux), grads = jax.jit(ours)(w, x, v)
    (expected, other), full = jax.jit(functools.partial(theirs, scale=0.5))(w, x, v)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, aux, other)
    theirs = jax.jit(lambda g: full_sketches(g, sketch))(full)
    for a, b in zip(grads.tree, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(grads.shapes())]
    assert shapes == [(x.shape, x.dtype) for x in full]


def test_arguments_that_are_not_there():
    gradient = fj.sketched_value_and_grad(jnp.sum, sketch_of(), argnums=1)
    with pytest.raises(ValueError, match="`argnums` must name .* after the state"):
        gradient(sketch_of().cycle(0), X)
    with pytest.raises(ValueError, match="`argnums` must name positional"):
        fj.explain_sketched_gradients(jnp.sum, 4)(x=X)


@pytest.mark.full
def test_what_else_a_function_returns_is_handed_back():
    """Whatever is no JAX array: as jax.value_and_grad does."""
    other = {"name": "run", "n": 3, "none": None, "size": np.float32(2), "a": X[0]}

    def fun(w):
        return jnp.sum(jnp.sin(X @ w)), other | {"norm": jnp.sum(w)}

    settings = {"argnums": np.int64(0), "has_aux": True}
    ours = fj.sketched_value_and_grad(fun, sketch_of(), **settings)
    (_, aux), grads = ours(sketch_of().cycle(0), numbers(1, 16, 24))
    (_, expected), _ = jax.value_and_grad(fun, **settings)(numbers(1, 16, 24))
    assert grads.tree.shape == (RANK, 24)
    np.testing.assert_allclose(aux.pop("norm"), expected.pop("norm"), rtol=1e-6)
    np.testing.assert_array_equal(aux.pop("a"), expected.pop("a"))
    assert aux == expected
    assert isinstance(aux["n"], int)


@pytest.mark.sample(1)
@pytest.mark.parametrize("shape", [(0, 16, 24), (0, 16, 12)])
def test_a_leaf_without_numbers(shape):
    def loss(w):
        return jnp.sum(jnp.sin(w**2)) + jnp.sum(jnp.einsum("bti,lio->lbto", X, w))

    sketch = sketch_of()
    tx = fj.compressed_accumulation(optax.sgd(0.1), 2, sketch)
    w = jnp.zeros(shape)

    @jax.jit
    def step(w):
        state = tx.init(w)
        grads = fj.sketched_value_and_grad(loss, sketch)(state, w)[1]
        return grads.tree, tx.update(grads, state, w)[0]

    sketch_of_w, update = step(w)
    assert sketch_of_w.shape == fj.plan_leaves(w, sketch).state_shape
    assert update.shape == shape


@pytest.mark.full
@pytest.mark.parametrize("simplified", [False, True])
def test_a_gradient_that_is_a_constant(simplified):
    """Also where JAX keeps constants in the equations."""
    constant = numbers(1, 16, 24)
    before = jax.config.jax_use_simplified_jaxpr_constants
    jax.config.update("jax_use_simplified_jaxpr_constants", simplified)
    try:
        reports = compare(lambda p: jnp.sum(p["w"] * constant), {"w": 2 * constant})
    finally:
        jax.config.update("jax_use_simplified_jaxpr_constants", before)
    assert reports["w"].fallbacks[0].primitive == "constant"


def test_a_gradient_that_is_an_argument():
    params = {"w": numbers(1, 16, 24), "v": numbers(2, 16, 24)}
    reports = compare(lambda p: jnp.vdot(p["w"], p["v"]), params)
    assert all(r.fallbacks for r in reports.values())


def test_a_gradient_of_zero():
    fun = functools.partial(lambda p: jnp.sum(X @ p["w"]))
    params = {"w": numbers(1, 16, 24), "unused": numbers(2, 16, 24)}
    value_and_grad = jax.jit(fj.sketched_value_and_grad(fun, sketch_of()))
    grads = value_and_grad(sketch_of().cycle(0), params)[1]
    np.testing.assert_array_equal(grads.tree["unused"], 0)
    assert grads.tree["unused"].shape == (4, 24)
    for report in fj.explain_sketched_gradients(fun, sketch_of())(params):
        assert report.sketched_during_backpropagation


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(24, dtype=jnp.float32)(x)
        x = linen.DenseGeneral((2, 8), axis=-1)(jnp.tanh(x))
        x = linen.DenseGeneral(16, axis=(-2, -1))(x)
        x = x + linen.MultiHeadDotProductAttention(2)(x)
        return linen.remat(linen.Dense)(16)(x)


@pytest.mark.full
def test_linen():
    model = Linen()
    params = model.init(jax.random.key(0), X)["params"]
    reports = compare(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, X))), params)
    kernels = {path: r for path, r in reports.items() if path.endswith("kernel")}
    assert len(kernels) == 8
    assert all(r.sketched_during_backpropagation for r in kernels.values())


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(16, 24, rngs=rngs)
        self.einsum = nnx.Einsum("bti,ihd->bthd", (24, 2, 8), rngs=rngs)
        self.general = nnx.LinearGeneral((2, 8), 16, axis=(-2, -1), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)

    def __call__(self, x):
        x = self.general(self.einsum(jnp.tanh(self.linear(x))))
        return x + self.attention(x)


@pytest.mark.full
def test_nnx_with_variables_in_the_tree():
    graphdef, state = nnx.split(Nnx(nnx.Rngs(0)))
    reports = compare(lambda s: jnp.sum(jnp.sin(nnx.merge(graphdef, s)(X))), state)
    kernels = {path: r for path, r in reports.items() if path.endswith("kernel")}
    assert len(kernels) == 7
    assert all(r.sketched_during_backpropagation for r in kernels.values())


def test_the_body_of_a_loop_is_planned_once_for_each_question(monkeypatch):
    """Four nested loops: two plans for each, not some power of their number."""
    planned = []
    original = Planner._planned
    monkeypatch.setattr(
        Planner,
        "_planned",
        lambda self, *args: planned.append(args) or original(self, *args),
    )

    def nested(h, w):
        if w.ndim == 2:
            return jnp.tanh(h @ w)
        return jax.lax.scan(lambda h, w: (nested(h, w), None), h, w)[0]

    fj.explain_sketched_gradients(lambda w: jnp.sum(nested(X, w)), sketch_of())(
        jnp.ones((2, 2, 2, 2, 16, 16))
    )
    assert len(planned) <= 12


@pytest.mark.full
def test_no_buffer_has_the_shape_of_a_full_gradient():
    params = {"a": numbers(1, 16, 40), "b": numbers(2, 40, 56)}

    def loss(p, x):
        return jnp.sum(jnp.sin(jnp.tanh(x @ p["a"]) @ p["b"]))

    def sketched(p, x):
        sketch = sketch_of()
        gradient = fj.sketched_value_and_grad(loss, sketch)
        return gradient(sketch.cycle(0), p, x)[1].tree

    def made(fun):
        """Shapes of what the program computes; parameters and their views aside."""
        text = jax.jit(fun).lower(params, X).compile().as_text()
        lines = re.findall(r"= f32\[([\d,]+)\]\S* ([\w-]+)\(", text)
        views = ("parameter", "bitcast", "get-tuple-element")
        return {shape for shape, op in lines if op not in views}

    full = {"16,40", "40,16", "40,56", "56,40"}
    assert made(jax.grad(loss)) & full
    assert not made(sketched) & full


@pytest.mark.parametrize(
    ("old", "new", "axes", "expected"),
    [
        ((12, 64), (768,), (0,), (0, 1)),
        ((768,), (12, 64), (0, 1), (0,)),
        ((768,), (12, 64), (1,), None),
        ((768,), (12, 64), (1, 0), None),
        ((4, 12, 64), (48, 64), (1,), (2,)),
        ((4, 12, 64), (48, 64), (1, 0), (2, 0, 1)),
        ((4, 12, 64), (4, 768), (1,), (1, 2)),
        ((1, 3, 1), (3,), (0,), (1,)),
        ((3,), (1, 3, 1), (1,), (0,)),
        ((2, 3), (3, 2), (0,), None),
        ((2, 3), (3, 2), (0, 1), (0, 1)),
        ((0, 3), (3, 0), (0,), None),
    ],
)
def test_axes_before_reshape(old, new, axes, expected):
    assert axes_before_reshape(old, new, axes) == expected
