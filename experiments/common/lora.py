"""LoRA (Hu et al., 2021, arXiv 2106.09685), for any model made of `nnx.Linear`.

A kernel W (n, m) stays as it is, and the layer adds (alpha/r) x A B, with A (n, r)
random and B (r, m) zero: the model starts as it was. Scanned layers, whose kernels are
(layers, n, m), get adapters with the same first axis.
"""

import zlib

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from experiments.models.build import Params

# Last names in the paths of the trained matrices A and B.
ADAPTERS = ("lora_a", "lora_b")
_HEAD = "lm_head"


class LoRALinear(nnx.Module):
    """A linear layer and its low-rank adapter."""

    def __init__(self, base: nnx.Linear, rank: int, scale: float, key: jax.Array):
        """Wraps `base`; its parameters are shared, not copied."""
        *stack, n, m = base.kernel.shape
        self.base = base
        self.scale = scale
        sample = jax.random.normal(key, (*stack, n, rank), jnp.float32)
        self.lora_a = nnx.Param(sample / n**0.5)
        self.lora_b = nnx.Param(jnp.zeros((*stack, rank, m), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., n) to (..., m)."""
        out = self.base(x)
        x, a, b = (y.astype(out.dtype) for y in (x, self.lora_a[...], self.lora_b[...]))
        return out + self.scale * ((x @ a) @ b)


def add(
    graphdef: nnx.GraphDef, params: Params, rank: int, alpha: float, seed: int
) -> tuple[nnx.GraphDef, Params]:
    """Adds an adapter to every attention and feed-forward matrix.

    Args:
        graphdef: the model's static part.
        params: its parameters.
        rank: r.
        alpha: the adapter's product is scaled by alpha/rank.
        seed: of the matrices A.

    Returns:
        Both parts of the model with adapters: kernels move from ".../kernel" to
        ".../base/kernel".
    """
    model = nnx.merge(graphdef, params)
    # Salted: the model's own parameters come from the bare key of the same seed.
    root = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"lora"))
    for path, parent in list(nnx.iter_modules(model)):
        for name, child in list(vars(parent).items()):
            if isinstance(child, nnx.Linear) and name != _HEAD:
                salt = zlib.crc32("/".join(map(str, (*path, name))).encode())
                key = jax.random.fold_in(root, salt)
                setattr(parent, name, LoRALinear(child, rank, alpha / rank, key))
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def divide(params: Params, *, tune_rest: bool) -> tuple[Params, Params]:
    """Divides parameters with adapters into those that are trained and the frozen ones.

    Args:
        params: of a model with adapters.
        tune_rest: train biases, norms, embeddings and the head along with the adapters.
    """
    trained, frozen = {}, {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        rest = tune_rest and path[-2:] != ("base", "kernel")
        (trained if rest or path[-1] in ADAPTERS else frozen)[path] = leaf
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def join(trained: Params, frozen: Params) -> Params:
    """Puts the two parts of :func:`divide` together again."""
    flat = traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(frozen)
    return traverse_util.unflatten_dict(flat)


def merge(params: Params, rank: int, alpha: float) -> Params:
    """Adds adapters to their kernels: the parameters of the model without them."""
    flat, merged = traverse_util.flatten_dict(params), {}
    for path, leaf in flat.items():
        if path[-1] in ADAPTERS:
            continue
        if "base" not in path:
            merged[path] = leaf
            continue
        parent = path[: path.index("base")]
        if path[-1] == "kernel":
            a, b = (flat[(*parent, name)] for name in ADAPTERS)
            leaf = leaf + (alpha / rank * (a @ b)).astype(leaf.dtype)
        merged[(*parent, path[-1])] = leaf
    return traverse_util.unflatten_dict(merged)
