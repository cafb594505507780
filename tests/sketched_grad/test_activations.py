"""What the backward pass is given of activations: sketches, where those suffice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as fj
from tests.sketched_grad.test_sketched_grad import X, compare, numbers, sketch_of

LAYERS, WIDTH, HIDDEN = 3, 16, 40
LEFT = sketch_of(side="left", same_projection=[("q", "k", "v")])
PARAMS = {
    "q": numbers(1, LAYERS, WIDTH, WIDTH),
    "k": numbers(2, LAYERS, WIDTH, WIDTH),
    "v": numbers(3, LAYERS, WIDTH, WIDTH),
    "up": numbers(4, LAYERS, WIDTH, HIDDEN),
    "down": numbers(5, LAYERS, HIDDEN, WIDTH),
}


def normed(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def block(x, layer):
    h = jax.checkpoint(normed)(x)
    q, k, v = (h @ layer[name] for name in "qkv")
    x = x + jax.checkpoint(lambda q, k, v: jnp.tanh(q * k) * v)(q, k, v)
    inner = jax.checkpoint(jax.nn.gelu)(jax.checkpoint(normed)(x) @ layer["up"])
    return x + inner @ layer["down"], None


def scanned(params, step=block):
    return jnp.mean(jax.lax.scan(step, X, params)[0] ** 2)


def unrolled(params):
    x = X
    for i in range(LAYERS):
        x, _ = block(x, jax.tree.map(lambda w, i=i: w[i], params))
    return jnp.mean(x**2)


def saving(policy):
    return functools.partial(scanned, step=jax.checkpoint(block, policy=policy))


LOSSES = {
    "scanned": scanned,
    "unrolled": unrolled,
    "recomputed": saving(None),
    "products_saved": saving(jax.checkpoint_policies.dots_saveable),
    "everything_saved": saving(jax.checkpoint_policies.everything_saveable),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("projection", [None, fj.Gaussian()], ids=["default", "dense"])
def test_the_sketch_is_that_of_the_full_gradient(projection, name):
    sketch = sketch_of(
        side="left", same_projection=[("q", "k", "v")], projection=projection
    )
    reports = compare(LOSSES[name], PARAMS, sketch)
    for report in reports.values():
        assert report.sketched_during_backpropagation, report
        if name in ("recomputed", "products_saved"):
            assert report.unsketched_activations.startswith("recomputed"), report
        else:
            assert report.unsketched_activations is None, report


def stacks_of(fun, sketch=LEFT, params=PARAMS):
    """Shapes and dtypes of what the forward loop over the layers stacks."""
    gradient = fj.sketched_value_and_grad(fun, sketch)

    def run(params):
        return gradient(sketch.cycle(0), params)[1].tree

    loops = [
        eqn
        for eqn in jax.make_jaxpr(run)(params).eqns
        if eqn.primitive.name == "scan" and eqn.params["length"] == LAYERS
    ]
    assert len(loops) == 2  # Forwards and backwards.
    carries = len(jax.tree.leaves(X))
    return [(v.aval.shape[1:], str(v.aval.dtype)) for v in loops[0].outvars[carries:]]


def test_a_loop_stacks_sketches_of_activations():
    stacks = stacks_of(scanned)
    tokens = X.shape[:2]
    # The inputs of the two norms, q, k and v, and the product before the activation
    # function are needed as they are. One sketch serves q, k and v.
    whole = sorted([(*tokens, WIDTH)] * 5 + [(*tokens, HIDDEN)])
    sketches = [(*tokens, 4)] * 3
    assert sorted(shape for shape, _ in stacks) == sorted(whole + sketches)


def test_without_a_common_projection_there_is_a_sketch_for_each():
    sketches = [s for s, _ in stacks_of(scanned, sketch_of(side="left")) if s[-1] == 4]
    assert len(sketches) == 5


def test_sides_of_cotangents_keep_activations_whole():
    sketch = sketch_of(side={"down": "right", "*": "left"})
    reports = compare(scanned, PARAMS, sketch)
    whole = {path for path, x in reports.items() if x.unsketched_activations}
    assert whole == {"down"}
    expected = "not its activations: recomputed, or the sketched side is that of the"
    assert expected in str(reports["down"])
    tokens = X.shape[:2]
    assert ((*tokens, HIDDEN), "float32") in stacks_of(scanned, sketch)[1:]


def test_sketches_have_the_dtype_of_activations():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)

    def narrow(params):
        x = X.astype(jnp.bfloat16)
        return jnp.mean(jax.lax.scan(block, x, params)[0].astype(jnp.float32) ** 2)

    sketches = [x for x in stacks_of(narrow, params=params) if x[0][-1] == 4]
    assert [dtype for _, dtype in sketches] == ["bfloat16"] * 3


def test_a_factor_that_is_read_whole_as_well():
    """No sketch of what is needed anyway is kept in addition."""

    def step(x, w):
        y = jnp.sin(x)
        return x + (y @ w) * y, None

    params = {"w": PARAMS["q"]}

    def loss(params):
        return jnp.mean(jax.lax.scan(step, X, params["w"])[0] ** 2)

    (report,) = compare(loss, params, LEFT).values()
    assert report.sketched_during_backpropagation
    assert "reads them for something else" in report.unsketched_activations
    assert not [shape for shape, _ in stacks_of(loss, params=params) if shape[-1] == 4]

    def once(params):
        return jnp.mean(step(X + params["b"], params["w"][0])[0] ** 2)

    params["b"] = numbers(7, WIDTH)
    report = compare(once, params, LEFT)["w"]
    assert "reads them for something else" in report.unsketched_activations
    # Where layers are unrolled it is sketched where the product is.
    sketched = fj.sketched_value_and_grad(once, LEFT)
    program = jax.make_jaxpr(lambda p: sketched(LEFT.cycle(0), p)[1].tree)(params)
    names = [eqn.primitive.name for eqn in program.eqns]
    sketch = next(i for i, v in enumerate(program.eqns) if _makes(v, (4, 6, 4)))
    # After the cosine of the backward pass.
    assert names.index("cos") < sketch


def _makes(eqn, shape):
    return any(v.aval.shape == shape for v in eqn.outvars)


@pytest.mark.parametrize("side", ["left", "right"])
def test_kernels_of_outputs_and_inputs(side):
    def loss(params):
        x = jnp.sin(X * params["scale"])
        return jnp.mean((x @ params["w"].T) ** 2)

    params = {"w": PARAMS["down"][0], "scale": numbers(10, WIDTH, scale=1)}
    report = compare(loss, params, sketch_of(side=side))["w"]
    assert (report.unsketched_activations is None) == (side == "right")


@pytest.mark.parametrize("side", ["left", "right"])
def test_branches_of_other_platforms_are_not_lowered(side):
    """A kernel of a TPU, which no CPU can run."""

    def cannot(x):
        return jax.pure_callback(lambda x: x, x, x, vmap_method="sequential")

    @jax.custom_vjp
    def doubled(x):
        return jax.lax.platform_dependent(x, tpu=cannot, default=lambda x: 2 * x)

    doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (doubled(g),))

    def loss(params):
        return jnp.mean((doubled(X @ params["v"]) @ params["w"]) ** 2)

    params = {"v": PARAMS["q"][0], "w": PARAMS["q"][1]}
    sketch = sketch_of(side=side)
    compare(loss, params, sketch)
    gradient = fj.sketched_value_and_grad(loss, sketch)
    lowered = jax.jit(lambda p: gradient(sketch.cycle(0), p)[1].tree).lower(params)
    assert "callback" not in lowered.as_text()


def test_shardings_within_the_loss_stay():
    mesh = jax.make_mesh((4,), ("x",))
    over = jax.NamedSharding(mesh, jax.P("x"))

    def loss(params):
        x = jax.jit(jnp.tanh, out_shardings=over)(X * params["scale"])
        return jnp.mean((x @ params["w"]) ** 2)

    params = {"w": PARAMS["q"][0], "scale": numbers(10, WIDTH, scale=1)}
    compare(loss, params, LEFT)
    gradient = fj.sketched_value_and_grad(loss, LEFT)
    ours = jax.jit(lambda p: gradient(LEFT.cycle(0), p)[1].tree).lower(params)
    plain = jax.jit(jax.grad(loss)).lower(params)
    assert "sdy.sharding" in plain.as_text()
    assert "sdy.sharding" in ours.as_text()


def test_a_factor_that_is_a_carry():
    def step(x, w):
        return jnp.tanh(x @ w), None

    def loss(params):
        return jnp.mean(jax.lax.scan(step, X, params["w"])[0] ** 2)

    compare(loss, {"w": PARAMS["q"]}, LEFT)


def test_a_factor_that_a_loop_ends_with():
    def loss(params):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x * w), None), X, params["scales"])
        return jnp.mean((x @ params["w"]) ** 2)

    params = {"scales": numbers(8, 3, WIDTH, scale=1), "w": PARAMS["q"][0]}
    report = compare(loss, params, LEFT)["w"]
    assert report.unsketched_activations is None


def test_factors_that_are_arguments_and_constants():
    def loss(params):
        return jnp.mean((X @ params["v"] @ params["w"]) ** 2)

    params = {"v": PARAMS["q"][0], "w": PARAMS["q"][1]}
    for report in compare(loss, params).values():
        assert report.sketched_during_backpropagation, report

    def product(params):
        return jnp.mean((params["v"] @ params["w"]) ** 2)

    compare(product, params, LEFT)


def test_dense_leaves_and_fallbacks_keep_activations_whole():
    def loss(params):
        return jnp.mean((X @ (params["w"] * params["w"]) + params["b"]) ** 2)

    params = {"w": PARAMS["q"][0], "b": numbers(9, WIDTH)}
    reports = fj.explain_sketched_gradients(loss, LEFT)(params)
    for report in reports:
        assert report.unsketched_activations == "its gradient is computed in full"


def test_temporaries_fall():
    """By what the activations take that are sketched."""
    x = jnp.zeros((64, 32, 64))
    params = {"w": np.zeros((8, 64, 64), np.float32)}

    def step(x, w):
        return x + jax.checkpoint(normed)(x) @ w, None

    def loss(params):
        return jnp.mean(jax.lax.scan(step, x, params["w"])[0] ** 2)

    sketch = sketch_of(8, side="left")
    sketched = fj.sketched_value_and_grad(loss, sketch)

    def temporaries(run):
        return jax.jit(run).lower(params).compile().memory_analysis().temp_size_in_bytes

    full = temporaries(jax.grad(loss))
    ours = temporaries(lambda params: sketched(sketch.cycle(0), params)[1].tree)
    # Of two stacks of activations one becomes its sketch, an eighth as large.
    assert full - ours >= 0.8 * 8 * x.nbytes
