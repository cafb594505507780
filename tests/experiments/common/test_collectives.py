"""Collectives of programs whose collectives are known."""

import jax
import jax.numpy as jnp

from experiments.common.collectives import Collective, collectives, total

DATA, NONE = jax.P("data"), jax.P()


def mesh():
    return jax.sharding.Mesh(jax.devices()[:4], ("data",))


def sent(function, *arguments, in_specs=DATA, out_specs=NONE):
    mapped = jax.shard_map(
        function, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return collectives(jax.jit(mapped).lower(*arguments).compile().as_text())


def test_kinds_and_sizes():
    """A device holds 2 x 8 of 8 x 8 elements of 4 bytes."""
    x = jnp.ones((8, 8))
    gathered = sent(lambda x: jax.lax.all_gather(x, "data", tiled=True), x)
    assert gathered == [Collective("all-gather", ((8, 8),), (256,), False)]
    assert total(sent(lambda x: jax.lax.psum(x, "data"), x)) == 64
    # A gradient before it is scattered, on each device: 8 x 8 elements.
    scatter = lambda x: jax.lax.psum_scatter(x, "data", tiled=True)  # noqa: E731
    found = sent(scatter, x, in_specs=NONE, out_specs=DATA)
    assert total(found) == 256


def test_loops_and_branches():
    def loop(x):
        return jax.lax.fori_loop(0, 3, lambda i, x: jax.lax.psum(x, "data"), x)

    def branch(x, due):
        least = lambda x: jax.lax.psum(x[:1], "data") + x  # noqa: E731
        return jax.lax.cond(due, lambda x: jax.lax.psum(x, "data"), least, x)

    x = jnp.ones((8, 8))
    assert total(sent(loop, x)) == 3 * 64
    found = sent(branch, x, True, in_specs=(DATA, NONE))
    assert sorted((x.sizes, x.optional) for x in found) == [
        ((32,), True),
        ((64,), True),
    ]


def test_none():
    assert sent(jnp.sin, jnp.ones((8, 8)), out_specs=DATA) == []


def test_one_that_overlaps_with_kernels_counts_once():
    """The TPU's compiler writes it into the kernels at its start and at its end."""
    gather = (
        "all-gather(%x), channel_id=7, replica_groups={{0,1}}, dimensions={0},"
        " use_global_device_ids=true"
    )
    text = f"""HloModule m

%start (x: f32[4]) -> f32[8] {{
  %x = f32[4] parameter(0)
  ROOT %y = f32[8] {gather}
}}
%end (x: f32[4]) -> f32[8] {{
  %x = f32[4] parameter(0)
  ROOT %y = f32[8] {gather}
}}
ENTRY %main (x: f32[4]) -> f32[8] {{
  %x = f32[4] parameter(0)
  %y = f32[8] fusion(%x), kind=kCustom, calls=%start
  ROOT %z = f32[8] fusion(%x), kind=kCustom, calls=%end
}}
"""
    assert collectives(text) == [Collective("all-gather", ((8,),), (32,), False)]
