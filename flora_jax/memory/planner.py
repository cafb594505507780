"""What an optimizer's state takes, leaf by leaf, before anything is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

from flora_jax import _validation as _checks
from flora_jax.leaves import trees as _state
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.rules import collected_plans, named_leaves
from flora_jax.memory import tables as _tables
from flora_jax.memory.budget import array_bytes
from flora_jax.sharding import state_sharding

_Keys: TypeAlias = tuple[Any, ...]


class LeafMemory(NamedTuple):
    """What one parameter takes.

    Attributes:
      path: normalised path of the parameter.
      shape: its shape.
      folds: how each transformation that sketches it does so.
      dense_reason: why nothing sketches it, or None.
      parameter_bytes: bytes of the parameter.
      state_bytes: bytes of its part of the state.
    """

    path: str
    shape: tuple[int, ...]
    folds: tuple[LeafPlan, ...]
    dense_reason: str | None
    parameter_bytes: int
    state_bytes: int


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What :func:`memory_plan` returns; ``print`` it, or call :meth:`print`.

    Attributes:
      leaves: one entry per parameter, in the order of ``jax.tree.leaves``.
      other_bytes: bytes of counters, keys and whatever else belongs to no parameter.
      peers: bytes of the state of other transformations, by name.
      per_device: whether all bytes are those of one device of a mesh.
    """

    leaves: tuple[LeafMemory, ...]
    other_bytes: int
    peers: Mapping[str, int]
    per_device: bool = False

    @property
    def state_bytes(self) -> int:
        """Bytes of the whole state."""
        return sum(leaf.state_bytes for leaf in self.leaves) + self.other_bytes

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(leaf.parameter_bytes for leaf in self.leaves)

    def __str__(self) -> str:
        """The tables as plain text."""
        return "\n\n".join(map(_tables.text, self._tables()))

    def print(self) -> None:
        """Prints the tables, with rich where it is installed."""
        _tables.show(self._tables())

    def _tables(self) -> list[_tables.Table]:
        return [_tables.leaf_table(self), _tables.total_table(self)]


def memory_plan(
    tx: optax.GradientTransformation,
    params: Any,
    *,
    compare: Mapping[str, optax.GradientTransformation] | None = None,
    shardings: Any = None,
) -> MemoryPlan:
    """Tells what the state of a transformation takes; allocates nothing.

    The bytes are those of ``tx.init(params)``, and stand at the parameter whose moment,
    accumulator or statistics they are.

    Args:
      tx: any transformation, in any chain or wrapper.
      params: parameters, or ShapeDtypeStructs of them; NNX States and Linen boxes as
        well.
      compare: transformations by name, whose totals stand beside; by default AdamW,
        Adafactor without and with momentum, and ``optax.MultiSteps`` around Adafactor.
      shardings: a NamedSharding or PartitionSpec per parameter, as for
        :func:`flora_jax.state_sharding`; bytes are then those of one device.

    Returns:
      The plan: ``print(plan)`` shows it as plain text, ``plan.print()`` with rich, with
      layers that differ in their numbers alone in one row.

    Raises:
      TypeError: for arguments of a wrong type.
      ValueError: for rules or shardings that do not fit the parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flora_jax as fj
      >>> params = {
      ...     "w": jax.ShapeDtypeStruct((1024, 4096), jnp.float32),
      ...     "b": jax.ShapeDtypeStruct((4096,), jnp.float32)}
      >>> print(fj.memory_plan(fj.flora(1e-3, rank=64), params, compare={}))
      leaf       shape     state  share  sketched as, or why not
      b           4096  32.0 KiB     3%  it has fewer than two axes
      w      1024x4096  1.02 MiB    97%  1024x4096 -> 64x4096
      other                272 B     0%  counters, keys
      <BLANKLINE>
      total          bytes  of parameters
      parameters  16.0 MiB           100%
      state       1.05 MiB             7%
    """
    tx = _checks.check_transformation("tx", tx)
    cut = {} if shardings is None else dict(named_leaves(shardings))
    if jax.sharding.get_abstract_mesh().empty and any(
        isinstance(x, jax.P) for x in cut.values()
    ):
        raise ValueError(
            "`shardings` of PartitionSpecs need the mesh of jax.set_mesh, got none;"
            " call memory_plan under it, or give NamedShardings"
        )
    if compare is None:
        compare = default_peers()
    shapes = jax.eval_shape(lambda tree: tree, params)
    with collected_plans() as plans:
        by_path, other = _by_parameter(tx, shapes, shardings)
    peers = {}
    for name, peer in compare.items():
        peer = _checks.check_transformation(name, peer)
        peers[name] = sum(size for _, size in _sizes(peer, shapes, shardings))
    leaves = []
    for path, leaf in named_leaves(shapes):
        mine = [plan for plan in plans if plan.path == path]
        folds = dict.fromkeys(plan for plan in mine if plan.dense_reason is None)
        reasons = [plan.dense_reason for plan in mine] or ["nothing sketches it"]
        leaves.append(
            LeafMemory(
                path,
                leaf.shape,
                tuple(folds),
                None if folds else reasons[0],
                _device_bytes(leaf, cut.get(path)),
                by_path[path],
            )
        )
    return MemoryPlan(tuple(leaves), other, peers, shardings is not None)


def default_peers() -> dict[str, optax.GradientTransformation]:
    """What a plan is compared with; the rates are not part of the states."""
    multi_steps = optax.MultiSteps(optax.adafactor(1e-3), every_k_schedule=2)
    return {
        "optax.adamw": optax.adamw(1e-3),
        "optax.adafactor": optax.adafactor(1e-3),
        "optax.adafactor, momentum": optax.adafactor(1e-3, momentum=0.9),
        "optax.MultiSteps(adafactor)": multi_steps.gradient_transformation(),
    }


def _sizes(tx: Any, shapes: Any, shardings: Any) -> list[tuple[_Keys, int]]:
    """Keys and bytes of each array of a state; 0 bytes where another's leaf is."""
    # Of a function that is new each time: JAX would not run init again for the plans.
    # Variables and boxes stay: masks and labels of the user may have their structure.
    state = jax.eval_shape(lambda params: tx.init(params), shapes)
    arrays = _leaves(state)
    if shardings is None:
        places = [None] * len(arrays)
    else:
        places = [x for _, x in _leaves(state_sharding(tx, shapes, shardings))]
    return [
        (keys, 0 if _state.is_masked(leaf) else _device_bytes(leaf, place))
        for (keys, leaf), place in zip(arrays, places, strict=True)
    ]


def _leaves(tree: Any) -> list[tuple[_Keys, Any]]:
    """Leaves, and what stands for those of others, without the keys of boxes."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_state.is_masked)
    value = jax.tree_util.GetAttrKey("value")
    return [(path[:-1] if path[-1:] == (value,) else path, leaf) for path, leaf in flat]


def _device_bytes(leaf: Any, sharding: Any) -> int:
    if sharding is None:
        return array_bytes(leaf)
    if isinstance(sharding, jax.P):
        sharding = jax.NamedSharding(jax.sharding.get_abstract_mesh(), sharding)
    shape = sharding.shard_shape(leaf.shape)
    return array_bytes(jax.ShapeDtypeStruct(shape, leaf.dtype))


def _by_parameter(tx: Any, shapes: Any, shardings: Any) -> tuple[dict[str, int], int]:
    """Bytes of the state by path of the parameter, and of all that has none.

    A part of the state is shaped as the parameters are if below it each of their paths
    is found; the name of one parameter alone may be that of something else.
    """
    named = zip(_leaves(shapes), named_leaves(shapes), strict=True)
    names = {keys: name for (keys, _), (name, _) in named}
    sizes = _sizes(tx, shapes, shardings)
    below: dict[_Keys, set[_Keys]] = {}
    for keys, _ in sizes:
        for i in range(len(keys) + 1):
            if keys[i:] in names:
                below.setdefault(keys[:i], set()).add(keys[i:])
    found, rest = dict.fromkeys(names.values(), 0), 0
    for keys, size in sizes:
        starts = (i for i in range(len(keys) + 1) if keys[i:] in names)
        owner = next((i for i in starts if len(below[keys[:i]]) == len(names)), None)
        if owner is None:
            rest += size
        else:
            found[names[keys[owner:]]] += size
    return found, rest
