"""Random trees of parameters, and gradients of every size for them."""

import collections
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

MAX_SIZE = 512  # Numbers of a leaf; a sketched side is never longer.
AXES = (1, 2, 3, 4, 5, 8, 12, 16)
LONG = ((1, 300), (300, 1), (2, 200), (200, 2), (5, 100), (3, 2, 80), (400,))
FLOATS = ("float32", "bfloat16", "float16")
ODD = ("complex64", "int32", "bool")
KINDS = ("normal", "zeros", "constant", "tiny", "large", "mixed")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter's shape and dtype; no node of jax, so a leaf of any tree."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def refused(self):
        """Whether no sketch can hold it."""
        return self.dtype in ODD


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    kernel: Any
    rest: Any


Pair = collections.namedtuple("Pair", ["left", "right"])


@st.composite
def shapes(draw):
    """0 to 5 axes: any sizes, one of them zero at times, and very long ones."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from(LONG))
    shape = []
    for size in draw(st.lists(st.sampled_from(AXES), max_size=5)):
        shape.append(size if math.prod(shape) * size <= MAX_SIZE else 1)
    if shape and draw(st.integers(0, 9)) == 0:
        shape[draw(st.integers(0, len(shape) - 1))] = 0
    return tuple(shape)


@st.composite
def leaves(draw):
    dtype = draw(st.sampled_from(FLOATS))
    if draw(st.integers(0, 9)) == 7:  # Zero is drawn more often than others.
        dtype = draw(st.sampled_from(ODD))
    return Leaf(draw(shapes()), dtype)


def trees():
    """Dicts, tuples, lists and dataclasses of leaves, None and MaskedNode."""
    matrices = st.builds(
        Leaf,
        st.sampled_from([(8, 12), (16, 8), (3, 8, 8), (12, 2, 8), (9, 7)]),
        st.sampled_from(FLOATS),
    )
    empty = st.sampled_from([None, optax.MaskedNode()])
    nested = st.recursive(
        st.one_of(leaves(), leaves(), matrices, empty),
        lambda inner: st.one_of(
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
            st.lists(inner, max_size=2),
            st.builds(lambda x, y: (x, y), inner, inner),
            st.builds(Pair, inner, inner),
            st.builds(Layer, inner, inner),
        ),
        max_leaves=3,
    )
    # One leaf at least folds to a matrix in most trees.
    # For a bare None updates could not tell that parameters are given.
    nested = nested.filter(lambda tree: tree is not None)
    return st.builds(Layer, matrices, nested) | st.tuples(matrices, nested) | nested


def parameters(tree, rng):
    """Parameters of a tree of leaves; some are zero, as biases are."""

    def leaf(leaf):
        values = rng.normal(size=leaf.shape) * (rng.random() < 0.8)
        return as_array(values, leaf.dtype)

    return jax.tree.map(leaf, tree)


def as_array(values, dtype):
    """Cast by NumPy: jax would compile a cast for each shape."""
    return jnp.asarray(values.astype(jnp.dtype(dtype)))


def gradients(tree, rng, narrow, tame):
    """Gradients from zero to near the largest that a leaf's dtype can sum up.

    Args:
      tree: of leaves.
      rng: a NumPy generator.
      narrow: whether some state is in float16.
      tame: whether float16 is to be spared entries of very different sizes.

    Returns:
      A tree of arrays.
    """

    def leaf(leaf):
        narrow_here = narrow or leaf.dtype == "float16"
        kinds = KINDS[:2] if tame and narrow_here else KINDS
        # A sketch adds up to MAX_SIZE numbers, which float16 must hold.
        tiny, large = (1e-6, 100.0) if narrow_here else (1e-20, 1e4)
        normal = rng.normal(size=leaf.shape)
        choices = rng.choice([0.0, tiny, 1.0, large], size=leaf.shape)
        values = {
            "normal": normal,
            "zeros": 0.0 * normal,
            "constant": np.full(leaf.shape, rng.normal()),
            "tiny": tiny * normal,
            "large": large * np.clip(normal, -1, 1),
            "mixed": choices * np.sign(normal),
        }[rng.choice(kinds)]
        return as_array(values, leaf.dtype)

    return jax.tree.map(leaf, tree)
