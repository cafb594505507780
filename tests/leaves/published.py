"""Weights of published models, in Hugging Face's layout and in MaxText's.

Shapes follow from the models' configurations. MaxText stacks the layers along the
second axis and names the axes; Hugging Face has a matrix for each layer, and experts as
matrices of their own. ``python -m tests.leaves.published`` prints the table of
docs/folds.md.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import flora_jax as fj

RANK = 256


class Model(NamedTuple):
    """Sizes of a decoder; experts of 0 means a dense one.

    MaxText scans over blocks of so many layers (``block``): it has a stack for each of
    these, and the layers that are left over by themselves.
    """

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int = 0
    expert_mlp: int = 0
    block: int = 1

    @property
    def stack(self) -> int:
        return self.layers // self.block


MODELS = {
    "Llama-3-8B": Model(32, 4096, 14336, 32, 8, 128),
    "Llama-3-70B": Model(80, 8192, 28672, 64, 8, 128),
    "Llama-3-405B": Model(126, 16384, 53248, 128, 8, 128),
    "Gemma-3-4B": Model(34, 2560, 10240, 8, 4, 256, block=6),
    "Gemma-3-27B": Model(62, 5376, 21504, 32, 16, 128, block=6),
    "Qwen3-0.6B": Model(28, 1024, 3072, 16, 8, 128),
    "Qwen3-8B": Model(36, 4096, 12288, 32, 8, 128),
    "Qwen3-30B-A3B": Model(48, 2048, 0, 32, 4, 128, 128, 768),
    "DeepSeek-V3": Model(58, 7168, 0, 128, 128, 128, 256, 2048),
}
# DeepSeek's multi-head latent attention: compressed queries, keys and values.
Q_RANK, KV_RANK, NOPE, ROPE = 1536, 512, 128, 64
# Its first layers, without experts.
DENSE_LAYERS, DENSE_MLP = 3, 18432


def maxtext(name):
    """Shape and names of each weight, with the stacked layers as second axis."""
    x = MODELS[name]
    out = ("heads", "layers", "kv", "embed")
    leaves = {
        "out": ((x.heads, x.stack, x.head_dim, x.width), out),
    }
    if name == "DeepSeek-V3":
        head = NOPE + ROPE
        leaves |= {
            "wq_a": ((x.width, x.stack, Q_RANK), ("embed", "layers", "q_lora")),
            "wq_b": (
                (Q_RANK, x.stack, x.heads, head),
                ("q_lora", "layers", "q_heads", "kv"),
            ),
            "wkv_a": (
                (x.width, x.stack, KV_RANK + ROPE),
                ("embed", "layers", "kv_lora"),
            ),
            "wkv_b": (
                (KV_RANK, x.stack, x.heads, NOPE + x.head_dim),
                ("kv_lora", "layers", "kv_heads", "kv_head_dim"),
            ),
            **gated("shared_", x.width, x.stack, x.expert_mlp),
            **gated("dense_", x.width, DENSE_LAYERS, DENSE_MLP),
        }
    else:
        for kind, heads in ("query", x.heads), ("key", x.kv_heads):
            names = ("embed", "layers", f"{kind[0]}_heads", "kv")
            leaves[kind] = ((x.width, x.stack, heads, x.head_dim), names)
    if x.experts:
        leaves |= {
            "gate": ((x.width, x.stack, x.experts), ("embed", "layers", None)),
            "wi": (
                (x.experts, x.stack, x.width, x.expert_mlp),
                ("exp", "layers", "embed", "mlp"),
            ),
            "wo": (
                (x.experts, x.stack, x.expert_mlp, x.width),
                ("exp", "layers", "mlp", "embed"),
            ),
        }
    else:
        leaves |= gated("", x.width, x.stack, x.mlp)
    return {k: v for k, v in leaves.items() if k != "key" or x.kv_heads != x.heads}


def gated(prefix, width, layers, mlp):
    """Shapes and names of a feed-forward layer's weights; two are alike."""
    return {
        f"{prefix}wi": ((width, layers, mlp), ("embed", "layers", "mlp")),
        f"{prefix}wo": ((mlp, layers, width), ("mlp", "layers", "embed")),
    }


def hugging_face(name):
    """Shape of each weight of one layer: (outputs, inputs)."""
    found = {}
    for path, (shape, names) in maxtext(name).items():
        sizes = [n for n, axis in zip(shape, names, strict=True) if axis != "layers"]
        if names[0] == "exp":
            sizes = sizes[1:]
        split = 2 if path == "out" else 1
        found[path] = (math.prod(sizes[split:]), math.prod(sizes[:split]))
    return found


def boxed(name):
    """The weights in MaxText's layout, in Variables that name their axes."""
    return nnx.State(
        {
            path: nnx.Param(jax.ShapeDtypeStruct(shape, jnp.bfloat16)).copy(
                out_sharding=names
            )
            for path, (shape, names) in maxtext(name).items()
        }
    )


def plans(name):
    """By path: the plans in Hugging Face's layout and in MaxText's."""
    sketch = fj.Sketch(RANK)
    shapes = hugging_face(name)
    plain = {k: jax.ShapeDtypeStruct(v, jnp.bfloat16) for k, v in shapes.items()}
    params = boxed(name)
    ours = fj.plan_leaves(plain, sketch)
    theirs = sketch.with_metadata(params).plan(params)
    return {plan.path: (ours[plan.path], plan) for plan in theirs}


def describe(plan):
    if plan.dense:
        return f"dense: {plan.dense_reason}"
    batch = "x".join(str(plan.shape[i]) for i in plan.batch_axes)
    matrix = f"{plan.rows}x{plan.columns}"
    state = "x".join(map(str, plan.state_shape))
    return f"{batch + ' of ' if batch else ''}{matrix}, state {state}"


def table():
    """The markdown of docs/folds.md below its introduction."""
    lines = [
        "| model | weight | Hugging Face | folded as | MaxText | folded as |",
        "|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        for path, both in plans(name).items():
            cells = [name, path]
            for plan in both:
                cells += ["x".join(map(str, plan.shape)), describe(plan)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
