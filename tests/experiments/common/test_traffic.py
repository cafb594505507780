"""What kernels of hand-written programs read, write and multiply."""

import jax
import jax.numpy as jnp
import pytest

from experiments.common.traffic import kernels, split

_HEAD = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def moved(body, before=""):
    """Bytes of each kernel of a program, by its name."""
    text = f"{_HEAD}{before}\nENTRY %main (x: f32[8,8]) -> f32[8,8] {{\n{body}\n}}\n"
    return {each.name: each.nbytes for each in kernels(text)}


def test_operands_and_results():
    found = moved(
        "  %x = f32[8,8]{1,0} parameter(0)\n"
        "  %y = bf16[8,8]{1,0:T(8,128)(2,1)} convert(%x)\n"
        "  ROOT %z = f32[8,8]{1,0} add(f32[8,8]{1,0} %x, %y)"
    )
    assert found == {"y": 256 + 128, "z": 256 + 128 + 256}


def test_memory_on_the_chip_costs_nothing():
    found = moved(
        "  %x = f32[8,8]{1,0} parameter(0)\n"
        "  %start = (f32[8,8]{1,0:S(1)}, f32[8,8]{1,0}, u32[]) copy-start(%x)\n"
        "  %y = f32[8,8]{1,0:T(8,128)S(1)} copy-done(%start)\n"
        "  ROOT %z = f32[8,8]{1,0} negate(%y)"
    )
    assert found["z"] == 256
    # The copy reads, and its result names what it read; a counter of 4 bytes.
    assert found["start"] == 256 + 4


_SLICES = """
%slices (p: f32[8,8], i: s32[]) -> f32[1,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %part = f32[1,8]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,8}
}
"""


def test_slices_and_updates_count_by_their_size():
    fused = (
        _SLICES
        + """
%updates (p: f32[8,8], q: f32[1,8], i: s32[]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %q = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %new = f32[8,8]{1,0} dynamic-update-slice(%p, %q, %i, %i)
}
"""
    )
    found = moved(
        "  %x = f32[8,8]{1,0} parameter(0)\n"
        "  %i = s32[] constant(0)\n"
        "  %part = f32[1,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%slices\n"
        "  ROOT %y = f32[8,8]{1,0} fusion(%x, %part, %i), kind=kLoop, calls=%updates",
        fused,
    )
    # A row read and written, besides an index of 4 bytes.
    assert found == {"part": 2 * 32 + 4, "y": 2 * 32 + 32 + 4}


def test_slices_inside_of_nested_fusions_count_by_their_size():
    fused = (
        _SLICES
        + """
%product (i: s32[], p: f32[8,8], q: f32[8,8]) -> f32[1,8] {
  %i = s32[] parameter(0)
  %p = f32[8,8]{1,0} parameter(1)
  %q = f32[8,8]{1,0} parameter(2)
  %left = f32[1,8]{1,0} fusion(%p, %i), kind=kLoop, calls=%slices
  %right = f32[1,8]{1,0} fusion(%q, %i), kind=kLoop, calls=%slices
  %all = f32[8,8]{1,0} negate(%q)
  ROOT %y = f32[1,8]{1,0} multiply(%left, %right)
}
"""
    )
    found = moved(
        "  %x = f32[8,8]{1,0} parameter(0)\n"
        "  %z = f32[8,8]{1,0} parameter(1)\n"
        "  %i = s32[] constant(0)\n"
        "  ROOT %y = f32[1,8]{1,0} fusion(%i, %x, %z), kind=kOutput, calls=%product",
        fused,
    )
    # The result, a row of one operand, all of the other, and an index.
    assert found == {"y": 32 + 32 + 256 + 4}


@pytest.mark.parametrize("counted", [True, False])
def test_loops_and_branches(counted):
    trips = ', backend_config={"known_trip_count":{"n":"3"}}' if counted else ""
    before = """
%body (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %more = f32[8,8]{1,0} negate(%x)
}
%condition (x: f32[8,8]) -> pred[] {
  %x = f32[8,8]{1,0} parameter(0)
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%limit, %limit), direction=LT
}
%same (x: f32[8,8]) -> f32[8,8] {
  ROOT %x = f32[8,8]{1,0} parameter(0)
}
"""
    branches = "branch_computations={%body, %same}"
    text = f"""{_HEAD}{before}
ENTRY %main (x: f32[8,8]) -> f32[8,8] {{
  %x = f32[8,8]{{1,0}} parameter(0)
  %due = pred[] constant(true)
  %y = f32[8,8]{{1,0}} while(%x), condition=%condition, body=%body{trips}
  ROOT %z = f32[8,8]{{1,0}} conditional(%due, %y, %y), {branches}
}}
"""
    found = kernels(text)
    always = [x.nbytes for x in found if x.name == "more" and not x.conditional]
    assert always == [3 * 512]
    branches = {(x.conditional, x.branch): x.nbytes for x in found if x.conditional}
    assert branches == {("z", "body"): 512, ("z", "same"): 0}
    # Every step runs the branch that moves nothing, some steps the other.
    kernels_of_every_step, besides = split(found)
    # Its condition compares two integers.
    assert sum(x.nbytes for x in kernels_of_every_step) == 3 * (512 + 9)
    assert besides == 512


def test_a_loop_of_unknown_length_is_a_branch():
    text = f"""{_HEAD}
%body (x: f32[8,8]) -> f32[8,8] {{
  %x = f32[8,8]{{1,0}} parameter(0)
  ROOT %more = f32[8,8]{{1,0}} negate(%x)
}}
%condition (x: f32[8,8]) -> pred[] {{
  %x = f32[8,8]{{1,0}} parameter(0)
  ROOT %less = pred[] constant(true)
}}
ENTRY %main (x: f32[8,8]) -> f32[8,8] {{
  %x = f32[8,8]{{1,0}} parameter(0)
  ROOT %y = f32[8,8]{{1,0}} while(%x), condition=%condition, body=%body
}}
"""
    found = kernels(text)
    assert {x.conditional for x in found} == {"y"}
    every_step, besides = split(found)
    assert sum(x.nbytes for x in every_step) == 0
    assert besides == 512


def test_products():
    """2·n·m·k operations, as the compiler for this device writes them."""
    x, y = jnp.ones((64, 32)), jnp.ones((32, 16))
    for precision in ("default", "highest"):
        multiply = jax.jit(lambda x, y, p=precision: jnp.dot(x, y, precision=p))
        found = kernels(multiply.lower(x, y).compile().as_text())
        (product,) = (each for each in found if each.flops)
        assert product.flops == 2 * 64 * 32 * 16
        assert product.precision == precision
        assert product.nbytes == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    convolution = """
  %x = f32[64,32]{1,0} parameter(0)
  %y = f32[32,16]{1,0} parameter(1)
  ROOT %z = f32[64,16]{1,0} convolution(%x, %y), dim_labels=bf_io->bf, PRECISION
""".replace("PRECISION", "operand_precision={default,high}")
    dot = """
  %x = f32[64,32]{1,0} parameter(0)
  %y = f32[32,16]{1,0} parameter(1)
  ROOT %z = f32[64,16]{1,0} dot(%x, %y), lhs_contracting_dims={1}, ALGORITHM
""".replace("ALGORITHM", "rhs_contracting_dims={0}, algorithm=dot_tf32_tf32_f32_x3")
    kernel = """
  %x = f32[64,32]{1,0} parameter(0)
  %y = f32[32,16]{1,0} parameter(1)
  ROOT %z = f32[64,16]{1,0} custom-call(%x, %y), custom_call_target="k", COST
""".replace("COST", 'backend_config={"cost_estimate":{"flops":"65536"}}')
    texts = (convolution, "high"), (dot, "3 of TF32"), (kernel, "bfloat16")
    for text, precision in texts:
        (product,) = kernels(f"{_HEAD}ENTRY %main () -> f32[] {{{text}}}")
        assert (product.flops, product.precision) == (2 * 64 * 32 * 16, precision)
