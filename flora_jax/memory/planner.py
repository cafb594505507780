"""What an optimizer's state takes, leaf by leaf, before anything is allocated."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax

from flora_jax import _validation as check
from flora_jax._typing import PyTree, Shape
from flora_jax.leaves import boxes, paths
from flora_jax.memory.budget import is_sketch, tree_bytes
from flora_jax.sharding.state_sharding import state_sharding
from flora_jax.sketching.sketch import Sketch, as_sketch, indivisible_rank

# Index of a layer: h.11.attn, layers/3/kernel, Dense_2.
_INDEX = re.compile(r"(?:(?<=[./_])|^)\d+(?=[./]|$)")


class Table(NamedTuple):
    """Cells as text.

    Attributes:
      heads: of the columns.
      rows: of cells.
      left: indices of the columns that are aligned to the left.
    """

    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    left: tuple[int, ...]

    def __str__(self) -> str:
        """The table with padded columns."""
        lines = [self.heads, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

        def line(cells: tuple[str, ...]) -> str:
            padded = [
                cell.ljust(width) if i in self.left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            return "  ".join(padded).rstrip()

        return "\n".join(map(line, lines))


class LeafMemory(NamedTuple):
    """What one parameter takes.

    Attributes:
      path: normalized path of the parameter.
      shape: its shape.
      sketches: shapes of the sketches in its state, such as of its momentum.
      dense_reason: why there are none, or None.
      replicated: why the sketches are sharded less than the parameter, or None.
      parameter_bytes: bytes of the parameter.
      state_bytes: bytes of its part of the state.
    """

    path: str
    shape: Shape
    sketches: tuple[Shape, ...]
    dense_reason: str | None
    replicated: str | None
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
        """Bytes of the full state."""
        return sum(leaf.state_bytes for leaf in self.leaves) + self.other_bytes

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(leaf.parameter_bytes for leaf in self.leaves)

    def __str__(self) -> str:
        """The tables as plain text."""
        return "\n\n".join(map(str, self._tables()))

    def print(self) -> None:
        """Prints the tables, with rich where it is installed."""
        _show(self._tables())

    def _tables(self) -> list[Table]:
        return [_leaf_table(self), _total_table(self)]


def memory_plan(
    tx: optax.GradientTransformation,
    params: PyTree,
    *,
    sketch: Sketch | int | None = None,
    compare: Mapping[str, optax.GradientTransformation] | None = None,
    shardings: PyTree = None,
) -> MemoryPlan:
    """Tells what the state of a transformation takes; allocates nothing.

    The bytes are those of ``tx.init(params)``, listed at the parameter whose moment,
    accumulator or statistics they are.

    Args:
      tx: any transformation, in any chain or wrapper.
      params: parameters, or ShapeDtypeStructs of them; NNX States and Linen boxes as
        well.
      sketch: the sketch that ``tx`` was made with, so that the plan says why a leaf is
        dense, and where a rank does not divide by the shards of a leaf; None to say
        only which leaves are dense.
      compare: transformations by name, whose totals are listed for comparison; by
        default AdamW, Adafactor without and with momentum, and ``optax.MultiSteps``
        around Adafactor.
      shardings: a NamedSharding or PartitionSpec per parameter, as for
        :func:`flora_jax.state_sharding`; bytes are then those of one device.

    Returns:
      The plan, as plain text by ``print(plan)``, with rich by ``plan.print()``. Layers
      that differ only in their index share a row.

    Raises:
      TypeError: for arguments of a wrong type.
      ValueError: for rules or shardings that do not fit the parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flora_jax as fj
      >>> params = {
      ...     "w": jax.ShapeDtypeStruct((1024, 4096), jnp.float32),
      ...     "b": jax.ShapeDtypeStruct((4096,), jnp.float32)}
      >>> sketch = fj.Sketch(64)
      >>> tx = fj.flora(1e-3, sketch)
      >>> print(fj.memory_plan(tx, params, sketch=sketch, compare={}))
      leaf       shape     state  share  sketched as, or why not
      b           4096  32.0 KiB     3%  it has fewer than two axes
      w      1024x4096  1.02 MiB    97%  1024x4096 -> 64x4096
      other                276 B     0%  counters, keys
      <BLANKLINE>
      total          bytes  of parameters
      parameters  16.0 MiB           100%
      state       1.05 MiB             7%
    """
    tx = check.check_transformation("tx", tx, params)
    places = {} if shardings is None else dict(paths.named_leaves(shardings))
    need_mesh = any(isinstance(place, jax.P) for place in places.values())
    if need_mesh and jax.sharding.get_abstract_mesh().empty:
        raise ValueError(
            "`shardings` of PartitionSpecs need the mesh of jax.set_mesh, got none;"
            " call memory_plan under it, or give NamedShardings"
        )
    nodes = dict(boxes.named_nodes(params))
    params = jax.eval_shape(lambda tree: tree, params)
    leaves = dict(paths.named_leaves(params))
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    plans = () if sketch is None else as_sketch(sketch).plan(params)
    reasons = {plan.path: plan.dense_reason for plan in plans}
    replicated = {
        plan.path: indivisible_rank(plan, nodes[plan.path], places.get(plan.path))
        for plan in plans
    }
    state: dict[str | None, list[Any]] = collections.defaultdict(list)
    for found, size in _sizes(tx, params, shardings):
        state[found.param].append((found, size))
    entries = []
    for path, leaf in leaves.items():
        own = state[path]
        sketches = dict.fromkeys(x.leaf.shape for x, _ in own if is_sketch(x, shapes))
        reason = None if sketches else reasons.get(path) or "not sketched"
        size = _device_bytes(leaf, places.get(path)), sum(size for _, size in own)
        lost = replicated.get(path) or None
        own = (path, leaf.shape, tuple(sketches), reason, lost)
        entries.append(LeafMemory(*own, *size))
    other = sum(size for _, size in state[None])
    peers = {}
    for name, peer in (default_peers() if compare is None else compare).items():
        peer = check.check_transformation(name, peer)
        peers[name] = sum(size for _, size in _sizes(peer, params, shardings))
    return MemoryPlan(tuple(entries), other, peers, shardings is not None)


def default_peers() -> dict[str, optax.GradientTransformation]:
    """What a plan is compared with; learning rates are not part of the states."""
    multi_steps = optax.MultiSteps(optax.adafactor(1e-3), every_k_schedule=2)
    return {
        "optax.adamw": optax.adamw(1e-3),
        "optax.adafactor": optax.adafactor(1e-3),
        "optax.adafactor, momentum": optax.adafactor(1e-3, momentum=0.9),
        "optax.MultiSteps(adafactor)": multi_steps.gradient_transformation(),
    }


def _sizes(
    tx: optax.GradientTransformation, params: PyTree, shardings: PyTree
) -> list[tuple[paths.StateLeaf, int]]:
    """Each array of a state and its bytes; 0 in place of another's leaf."""
    # Variables and boxes stay: masks and labels of the user may have their structure.
    found = paths.state_leaves(paths.abstract_state(tx.init, params), params)
    places = [None] * len(found)
    if shardings is not None:
        layout = state_sharding(tx, params, shardings)
        places = jax.tree.leaves(layout, is_leaf=paths.is_masked)
    return [
        (entry, 0 if paths.is_masked(entry.leaf) else _device_bytes(entry.leaf, place))
        for entry, place in zip(found, places, strict=True)
    ]


def _device_bytes(leaf: Any, sharding: Any) -> int:
    if isinstance(sharding, jax.P):
        sharding = jax.NamedSharding(jax.sharding.get_abstract_mesh(), sharding)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return tree_bytes(jax.ShapeDtypeStruct(shape, leaf.dtype))


def _leaf_table(plan: MemoryPlan) -> Table:
    """A row per parameter, those of equal layers in one, and one for the rest."""
    total = max(plan.state_bytes, 1)
    alike: dict[tuple[str, ...], list[LeafMemory]] = {}
    for leaf in plan.leaves:
        shape = _product(leaf.shape)
        sketches = ", ".join(f"{shape} -> {_product(x)}" for x in leaf.sketches)
        how = leaf.dense_reason or "; ".join(filter(None, (sketches, leaf.replicated)))
        row = (_INDEX.sub("*", leaf.path), shape, how)
        alike.setdefault((*row, str(leaf.state_bytes)), []).append(leaf)
    rows = []
    for (path, shape, how, _), leaves in alike.items():
        size = sum(leaf.state_bytes for leaf in leaves)
        if len(leaves) == 1:
            path = leaves[0].path
        else:
            shape = f"{len(leaves)} of {shape}" if shape else f"{len(leaves)} scalars"
        rows.append((path, shape, format_bytes(size), f"{size / total:.0%}", how))
    other = format_bytes(plan.other_bytes), f"{plan.other_bytes / total:.0%}"
    rows.append(("other", "", *other, "counters, keys"))
    where = " on a device" if plan.per_device else ""
    heads = ("leaf", "shape", f"state{where}", "share", "sketched as, or why not")
    return Table(heads, rows, (0, 4))


def _total_table(plan: MemoryPlan) -> Table:
    """Parameters, state, and the states of the peers."""
    sizes = {"parameters": plan.parameter_bytes, "state": plan.state_bytes}
    rows = [
        (name, format_bytes(size), f"{size / max(plan.parameter_bytes, 1):.0%}")
        for name, size in {**sizes, **plan.peers}.items()
    ]
    where = " on a device" if plan.per_device else ""
    return Table(("total", f"bytes{where}", "of parameters"), rows, (0,))


def _product(shape: Shape) -> str:
    return "x".join(map(str, shape))


def format_bytes(size: float) -> str:
    """Three digits and a binary unit: 1536 is 1.50 KiB."""
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 999.5 or unit == "TiB":
            break
    return f"{size:.{max(0, 2 - len(str(int(size))) + 1)}f} {unit}"


def _show(tables: list[Table]) -> None:
    """Prints tables, with rich where it is installed."""
    if importlib.util.find_spec("rich") is None:
        print("\n\n".join(map(str, tables)))
        return
    import rich.console
    import rich.markup
    import rich.table

    console = rich.console.Console()
    for table in tables:
        shown = rich.table.Table(*table.heads)
        for i, column in enumerate(shown.columns):
            column.justify = "left" if i in table.left else "right"
            column.overflow = "fold"
        for row in table.rows:
            shown.add_row(*map(rich.markup.escape, row))
        console.print(shown)
