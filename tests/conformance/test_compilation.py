"""What compiling an update costs: leaves that are alike share their kernels on CPU."""

import re

import jax
import jax.numpy as jnp

import flora_jax as fj
from tests.conformance.cases import every_sketching_case

_COMPUTATION = re.compile(r"^%fused_computation\S* .*?^}", re.DOTALL | re.MULTILINE)


def kernels(case, leaves):
    """How many kernels differ in more than names, as XLA compiles one of each."""
    params = {f"layer{i:02}": {"kernel": jnp.ones((24, 40))} for i in range(leaves)}
    tx = case()
    compiled = (
        jax.jit(lambda g, s, p: fj.update_and_apply(tx, g, s, p))
        .lower(params, jax.eval_shape(tx.init, params), params)
        .compile()
    )
    return len(set(map(unnamed, _COMPUTATION.findall(compiled.as_text()))))


def unnamed(computation):
    """The text of a computation, its names replaced by the order they appear in."""
    text = re.sub(r", metadata=\{[^}]*\}", "", computation)
    names = {}
    return re.sub(
        r"%[\w.-]+|param_[\d.]+",
        lambda name: names.setdefault(name[0], f"%{len(names)}"),
        text,
    )


@every_sketching_case
def test_equal_leaves_share_their_kernels(case):
    assert 0 < kernels(case, 8) <= kernels(case, 5)
